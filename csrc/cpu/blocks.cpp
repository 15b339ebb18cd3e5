#include "blocks.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "products.h"
#include "simd.h"

namespace mlp_fusion {
namespace {

// Rows that one item covers.
constexpr int64_t kRows = 64;
// Columns of the points that one item covers.
constexpr int64_t kStrip = 512;

// Rows are padded with zeros to a multiple of kLanes.
MLP_CLONES double weighted_sum(const float* row, const double* w, int64_t width) {
  Double8 total = {};
  for (int64_t j = 0; j < width; j += kLanes) total += load_double(row + j) * load<Double8>(w + j);
  return sum(total);
}

// The sum of two offsets is the same either way round, and so g stays symmetric to the bit.
MLP_CLONES void subtract_offsets(float* row, double own, const double* other, int64_t width) {
  for (int64_t j = 0; j < width; j += kLanes) {
    store_double(row + j, load_double(row + j) - (own + load<Double8>(other + j)));
  }
}

// sums[b * n + i] = sum_j g_ij w_j, with w (batch, padded n).
std::vector<double> row_sums(const float* g, const std::vector<double>& w, int64_t batch, int64_t n, int64_t stride) {
  std::vector<double> sums(batch * n);
  const int64_t groups = (n + kRows - 1) / kRows;
  for_each(batch * groups, [&](int64_t item) {
    const int64_t b = item / groups, begin = item % groups * kRows;
    for (int64_t i = begin; i < std::min(begin + kRows, n); ++i) {
      sums[b * n + i] = weighted_sum(g + (b * n + i) * stride, w.data() + b * padded(n), padded(n));
    }
  });
  return sums;
}

}  // namespace

template <class In>
void block_moments(const In* x, int64_t batch, int64_t n, int64_t d, double* moments, double* squares) {
  const int64_t strips = (d + kStrip - 1) / kStrip;
  std::vector<double> means(batch * strips, 0.0), own(batch * strips * n, 0.0);
  for_each(batch * strips, [&](int64_t item) {
    const int64_t b = item / strips, begin = item % strips * kStrip, width = std::min(kStrip, d - begin);
    const In* points = x + b * n * d + begin;
    double sum[kStrip] = {};
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) add_four(points + i * d, d, width, sum, own.data() + item * n + i);
    for (; i < n; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        const double value = as_double(points[i * d + j]);
        sum[j] += value;
        own[item * n + i] += value * value;
      }
    }
    for (int64_t j = 0; j < width; ++j) means[item] += sum[j] * sum[j] / n;
  });
  for (int64_t b = 0; b < batch; ++b) {
    double total = 0, of_mean = 0;
    for (int64_t i = 0; i < n; ++i) {
      double& row = squares[b * n + i] = 0;
      for (int64_t strip = 0; strip < strips; ++strip) row += own[(b * strips + strip) * n + i];
      total += row;
    }
    for (int64_t strip = 0; strip < strips; ++strip) of_mean += means[b * strips + strip];
    moments[2 * b] = total - of_mean;
    moments[2 * b + 1] = total;
  }
}

void centre_gram(float* g, const double* w, int64_t batch, int64_t n, int64_t stride, double* moments) {
  mirror_all(g, batch, n, stride);
  const int64_t width = padded(n), groups = (n + kRows - 1) / kRows;
  for_each(batch * n, [&](int64_t row) { std::fill(g + row * stride + n, g + row * stride + width, 0.0f); });
  std::vector<double> shares(batch * width, 0.0), offsets(batch * width, 0.0);
  for (int64_t b = 0; b < batch; ++b) {
    const double total = std::accumulate(w + b * n, w + (b + 1) * n, 0.0);
    for (int64_t j = 0; j < n; ++j) shares[b * width + j] = w[b * n + j] / total;
  }
  // Products with the mean, less half of its square: two of these are what a product loses.
  const std::vector<double> sums = row_sums(g, shares, batch, n, stride);
  for (int64_t b = 0; b < batch; ++b) {
    double square = 0;
    for (int64_t i = 0; i < n; ++i) square += shares[b * width + i] * sums[b * n + i];
    for (int64_t i = 0; i < n; ++i) offsets[b * width + i] = sums[b * n + i] - square / 2;
  }
  const auto moment = [&](int64_t b) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += w[b * n + i] * g[(b * n + i) * stride + i];
    return total;
  };
  for (int64_t b = 0; b < batch; ++b) moments[2 * b + 1] = moment(b);
  for_each(batch * groups, [&](int64_t item) {
    const int64_t b = item / groups, begin = item % groups * kRows;
    for (int64_t i = begin; i < std::min(begin + kRows, n); ++i) {
      float* row = g + (b * n + i) * stride;
      subtract_offsets(row, offsets[b * width + i], offsets.data() + b * width, width);
      std::fill(row + n, row + width, 0.0f);
    }
  });
  for (int64_t b = 0; b < batch; ++b) moments[2 * b] = moment(b);
}

void gram_inertia(const float* g, const double* w, const int64_t* labels, int64_t batch, int64_t n, int64_t stride,
                  int64_t K, double* inertia) {
  for_each(batch, [&](int64_t b) {
    const float* own = g + b * n * stride;
    std::vector<std::vector<int64_t>> members(K);
    for (int64_t j = 0; j < n; ++j) members[labels[b * n + j]].push_back(j);
    double total = 0;
    for (const std::vector<int64_t>& list : members) {
      double weight = 0, products = 0;
      for (int64_t i : list) {
        weight += w[b * n + i];
        total += w[b * n + i] * own[i * stride + i];
        for (int64_t j : list) products += w[b * n + i] * w[b * n + j] * own[i * stride + j];
      }
      if (weight > 0) total -= products / weight;
    }
    inertia[b] = total;
  });
}

template void block_moments(const float*, int64_t, int64_t, int64_t, double*, double*);
template void block_moments(const uint16_t*, int64_t, int64_t, int64_t, double*, double*);

}  // namespace mlp_fusion
