// k-means of points that lie in several blocks of columns, from the Gram matrices of the blocks: what scaling and
// centring the points would do is done to their products.
#pragma once

#include <cstdint>

namespace mlp_fusion {

// Add to `sum` (batch, n, stride) the Gram matrices g of one block, each divided by the block's total variance about its
// plain mean. moments (batch, 2): that variance, and the sum of squares; nothing is added unless the variance is positive
// and finite.
void add_balanced(float* sum, const float* g, int64_t batch, int64_t n, int64_t stride, double* moments);

// Make g (batch, n, stride) the products of the points less their mean, weighted by w (batch, n). moments (batch, 2):
// the weighted sums of squares afterwards and before.
void centre_gram(float* g, const double* w, int64_t batch, int64_t n, int64_t stride, double* moments);

// inertia[b]: weighted sum of squared distances of the points to the means of their K labels.
void gram_inertia(const float* g, const double* w, const int64_t* labels, int64_t batch, int64_t n, int64_t stride,
                  int64_t K, double* inertia);

}  // namespace mlp_fusion
