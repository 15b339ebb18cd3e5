// The kernels of fusion_kernels/ntk/cuda_backend.py, as library.cpp launches them.
#pragma once

#include <cuda_runtime_api.h>

#include "gram.h"
#include "strip.h"

namespace mlp_fusion::cuda {

constexpr int64_t kMostBlocks = 0x7fffffff;  // of one launch

template <class T>
cudaError_t write_operand(const Factors<T>& factors, Format format, void* operand, cudaStream_t stream);

// On tensor cores; compute capability 8.0 or newer. The operands are of any format but plain.
cudaError_t gram_tensor_cores(const Gram<float>& gram, Format format, cudaStream_t stream);

// In T throughout.
template <class T>
cudaError_t gram_plain(const Gram<T>& gram, cudaStream_t stream);

template <class T>
cudaError_t strip_sums(const Strip<T>& strip, cudaStream_t stream);

}  // namespace mlp_fusion::cuda
