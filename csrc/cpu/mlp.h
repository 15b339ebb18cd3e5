// A feed-forward block on the CPU, tokens in chunks whose hidden tile stays in the cache: the formulas of
// fusion_kernels/mlp/reference.py, with products by PyTorch's BLAS or by gemm.h, of few tokens
// by mlp_few.h.
#pragma once

#include <cstdint>

#include "mlp_pointwise.h"

namespace mlp_fusion {

// A matrix with any strides, in elements. A null one is not there.
template <class T>
struct Matrix {
  T* data = nullptr;
  int64_t rows = 0, columns = 0, row_stride = 0, column_stride = 1;

  explicit operator bool() const { return data != nullptr; }
  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
  Matrix narrow(int64_t begin, int64_t end) const {
    return {data + begin * row_stride, end - begin, columns, row_stride, column_stride};
  }
};

// The block of fusion_kernels/ffn.py, its weights in the dtype of x and in the order and orientation of that type: w_in
// (h, d), w_out (h, d_out), w_gate (h, d) or null. The scale is the factors of the h columns around phi; null stands for
// ones. The gate is plain where w_gate is null.
template <class T>
struct FFN {
  Activation phi;
  Matrix<T> w_in, w_out, w_gate;
  T *b_in = nullptr, *b_gate = nullptr, *b_out = nullptr;
  const Wide<T>*before = nullptr, *behind = nullptr;
  Gate<Wide<T>> gate;

  // Null for a plain one.
  const Gate<Wide<T>>* limits() const { return gate.plain() ? nullptr : &gate; }
};

// y (T, d_out) of x (T, d). Whichever of z, g, a (T, h) are not null are kept, without the factors; all are contiguous.
template <class T>
void mlp_forward(const FFN<T>& ffn, Matrix<T> x, T* y, T* z, T* g, T* a);

// Gradients; whatever is null is not computed. dx (T, d), the others as what they belong to, contiguous. Sums over tokens
// are in float, for double in double. dw_out is (h, d_out) with contiguous columns, as the products make it and a Linear
// stores it. Without dw_out, the gradient of the factors behind phi has a matrix of its own.
// z, g, a are what the forward kept, null where it did not.
template <class T>
struct MlpGradients {
  T* dx = nullptr;
  Wide<T>*dw_in = nullptr, *dw_out = nullptr, *dw_gate = nullptr;
  Wide<T>*db_in = nullptr, *db_gate = nullptr, *db_out = nullptr;
  Wide<T>*d_before = nullptr, *d_behind = nullptr;
};
template <class T>
void mlp_backward(const FFN<T>& ffn, Matrix<T> dy, Matrix<T> x, T* z, T* g, T* a, const MlpGradients<T>& out);

}  // namespace mlp_fusion
