// The kernels of fusion_kernels/ntk/cuda_backend.py, as library.cpp launches them.
//
//   K = constant + H1 H2ᵀ + (X1 X2ᵀ + bias) ∘ (S1 S2ᵀ)
//
// of two operands (operand.h), each the columns X | S | H of its rows. One block of threads computes one tile of K with
// two accumulators: X1 X2ᵀ in the first, S1 S2ᵀ in the second, which is then multiplied by the first and goes on to H1 H2ᵀ.
// Nothing of the size of K is stored but K. Each value of K has one summation order, which depends on the number of
// columns alone.
#pragma once

#include <cuda_runtime_api.h>

#include "operand.h"

namespace mlp_fusion::cuda {

// Values of T are stored as they are (one plane, stored as T) or as bfloat16: rounded (one plane), or rounded and what
// rounding left, rounded again (two planes, 16 significant bits).
enum class Format { plain, bfloat16, bfloat16_twice };

MLP_HD int planes(Format format) { return format == Format::bfloat16_twice ? 2 : 1; }

template <class T>
struct Gram {
  const void *left, *right;  // (planes, n1 or n2, columns.all())
  int64_t n1, n2;
  Columns columns;
  T bias, constant;
  bool accumulate;  // add to what `out` holds
  bool symmetric;   // left and right are the same: half of the tiles are computed, and mirrored bit by bit
  T* out;
  int64_t stride;  // of the rows of out
};

template <class T>
cudaError_t write_operand(const Factors<T>& factors, Format format, void* operand, cudaStream_t stream);

// On tensor cores; compute capability 8.0 or newer.
cudaError_t gram_bfloat16(const Gram<float>& gram, int planes, cudaStream_t stream);

// In T throughout.
template <class T>
cudaError_t gram_plain(const Gram<T>& gram, cudaStream_t stream);

}  // namespace mlp_fusion::cuda
