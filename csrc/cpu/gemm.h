// Products of float matrices for the feed-forward blocks, where they are faster here than by PyTorch's BLAS.
#pragma once

#include "mlp.h"

namespace mlp_fusion {

// Whether `gemm` is what products are for: on processors with AVX2 and FMA that are not Intel's, for which the BLAS of
// PyTorch's builds is written first; or what FUSION_KERNELS_CPU_PRODUCTS in the environment says (own, blas).
bool has_gemm();

// out = a b, plus what is there if `add`, else plus `bias` in every row if that is not null. The rows of out are
// contiguous, a and b have any strides. Every element is summed in an order that depends on the number of columns of a
// alone: not on the other sizes, on its place or on the number of threads.
void gemm(const Matrix<float>& out, const Matrix<float>& a, const Matrix<float>& b, const float* bias, bool add);

}  // namespace mlp_fusion
