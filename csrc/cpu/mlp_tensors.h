// New tensors of a feed-forward block, without a look-up of torch's operators: that would take longer than the products
// of one token.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>

namespace mlp_fusion {

// A contiguous tensor on the CPU, its elements not set.
template <size_t Dimensions>
torch::stable::Tensor allocate(const std::array<int64_t, Dimensions>& shape, torch::headeronly::ScalarType dtype) {
  std::array<int64_t, Dimensions> strides;
  int64_t stride = 1;
  for (size_t i = Dimensions; i-- > 0; stride *= shape[i] > 1 ? shape[i] : 1) strides[i] = stride;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      Dimensions, shape.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), aoti_torch_device_type_cpu(), 0, &handle));
  return torch::stable::Tensor(handle);
}

}  // namespace mlp_fusion
