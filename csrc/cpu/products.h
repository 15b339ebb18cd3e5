// Matrix products of the k-means operators, through PyTorch's own BLAS.
#pragma once

#include <cstdint>

namespace mlp_fusion {

// c = a bᵀ for row-major a (m, k), b (n, k) and c (m, n) with the given distances between rows.
template <class T>
void multiply_transposed(const T* a, int64_t m, int64_t a_stride, const T* b, int64_t n, int64_t b_stride, int64_t k,
                         T* c, int64_t c_stride);

// g = x xᵀ of each of `batch` problems x (n, k), contiguous; g is (batch, n, stride) with zeros beyond column n. Rows
// are multiplied in panels with the rows up to their own, which is about half of the product; the rest is mirrored, so
// that g is symmetric to the bit.
template <class T>
void gram_matrices(const T* x, int64_t batch, int64_t n, int64_t k, T* g, int64_t stride);

// g += factor x xᵀ up to the diagonal, of each problem and its factor: of float or bfloat16 (the bits), faster where
// bfloat16 holds all numbers of a problem exactly and the processor multiplies those. Equal numbers give equal bits, in
// whichever type they are. What stands above the diagonal is undefined afterwards.
template <class In>
void add_products(const In* x, const double* factors, int64_t batch, int64_t n, int64_t k, float* g, int64_t stride);

// Fill what stands above the diagonal of g from what stands below.
template <class T>
void mirror_all(T* g, int64_t batch, int64_t n, int64_t stride);

// out = a xᵀ of each problem: a (batch, m, k), x (batch, n, k), out (batch, m, stride) with zeros beyond column n.
template <class T>
void cross_products(const T* a, const T* x, int64_t batch, int64_t m, int64_t n, int64_t k, T* out, int64_t stride);

}  // namespace mlp_fusion
