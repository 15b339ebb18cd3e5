// New tensors of a feed-forward block, without a look-up of torch's operators: that would take longer than the products
// of one token.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>

namespace mlp_fusion {

// A tensor on the CPU with the given strides, its elements not set.
template <size_t Dimensions>
torch::stable::Tensor allocate_strided(const std::array<int64_t, Dimensions>& shape,
                                       const std::array<int64_t, Dimensions>& strides,
                                       torch::headeronly::ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      Dimensions, shape.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), aoti_torch_device_type_cpu(), 0, &handle));
  return torch::stable::Tensor(handle);
}

// The same, contiguous.
template <size_t Dimensions>
torch::stable::Tensor allocate(const std::array<int64_t, Dimensions>& shape, torch::headeronly::ScalarType dtype) {
  std::array<int64_t, Dimensions> strides;
  int64_t stride = 1;
  for (size_t i = Dimensions; i-- > 0; stride *= shape[i] > 1 ? shape[i] : 1) strides[i] = stride;
  return allocate_strided(shape, strides, dtype);
}

// The same of a matrix, column by column.
inline torch::stable::Tensor allocate_columns(int64_t rows, int64_t columns, torch::headeronly::ScalarType dtype) {
  return allocate_strided<2>({rows, columns}, {1, rows > 1 ? rows : 1}, dtype);
}

}  // namespace mlp_fusion
