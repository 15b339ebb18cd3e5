// Tensors of the stable ABI as the operators take them: checked, and as typed pointers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>

namespace mlp_fusion {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor new_tensor(std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::empty({shape.begin(), shape.size()}, dtype, std::nullopt,
                              torch::stable::Device(DeviceType::CPU));
}

inline void check(const Tensor& tensor, const char* name, ScalarType dtype, std::initializer_list<int64_t> shape,
                  DeviceType device = DeviceType::CPU) {
  bool fits = tensor.device().type() == device && tensor.is_contiguous() && tensor.scalar_type() == dtype &&
              tensor.dim() == static_cast<int64_t>(shape.size());
  for (int64_t d = 0; fits && d < tensor.dim(); ++d) fits = tensor.size(d) == shape.begin()[d];
  STD_TORCH_CHECK(fits, name, ": wrong device, dtype, shape or strides");
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? data<T>(*tensor) : nullptr;
}

// Call work(T{}) with T the element type of x: float or double.
template <class Work>
auto with_dtype(const Tensor& x, const Work& work) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                  "float32 or float64 expected");
  return x.scalar_type() == ScalarType::Double ? work(double{}) : work(float{});
}

}  // namespace mlp_fusion
