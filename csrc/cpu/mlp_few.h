// The products of a feed-forward block for few tokens, where a call of a BLAS and its packing cost more than they bring.
#pragma once

#include <cstdint>

#include "mlp.h"

namespace mlp_fusion {

// Up to so many rows, `project_few` is faster than a BLAS.
constexpr int64_t kFewRows = 20;

// out = x wᵀ + bias, or without where it is null; the rows of x, w and out are contiguous. Every element is summed in an
// order that depends on the number of columns of x alone.
void project_few(const Matrix<float>& out, const Matrix<float>& x, const Matrix<float>& w, const float* bias);

}  // namespace mlp_fusion
