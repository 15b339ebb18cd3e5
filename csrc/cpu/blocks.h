// k-means of points that lie in several blocks of columns, from the Gram matrices of the blocks: what scaling and
// centring the points would do is done to their products.
#pragma once

#include <cstdint>

namespace mlp_fusion {

// Of points x (batch, n, d), floats or the bits of bfloat16: moments (batch, 2), their total variance about their plain
// mean and the sum of their squares; squares (batch, n), those of each point.
template <class In>
void block_moments(const In* x, int64_t batch, int64_t n, int64_t d, double* moments, double* squares);

// Make g (batch, n, stride), of which the part up to the diagonal counts, the products of the points less their mean,
// weighted by w (batch, n). moments (batch, 2): the weighted sums of squares afterwards and before.
void centre_gram(float* g, const double* w, int64_t batch, int64_t n, int64_t stride, double* moments);

// inertia[b]: weighted sum of squared distances of the points to the means of their K labels.
void gram_inertia(const float* g, const double* w, const int64_t* labels, int64_t batch, int64_t n, int64_t stride,
                  int64_t K, double* inertia);

}  // namespace mlp_fusion
