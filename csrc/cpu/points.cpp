#include "points.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "kmeans.h"
#include "parallel.h"
#include "products.h"

namespace mlp_fusion {
namespace {

// Columns that one item of a column sum covers, and rows that one item of an elementwise pass covers.
constexpr int64_t kColumns = 512;
constexpr int64_t kRows = 64;
// Entries of a block of products in `nearest_centroids`, and its rows.
constexpr int64_t kBlockEntries = 1 << 18;
constexpr int64_t kLeastRows = 32, kMostRows = 512;

// The power of two that brings `largest` into [1/2, 1); 1 for 0.
double scale_for(double largest) { return largest > 0 ? std::ldexp(1.0, -(std::ilogb(largest) + 1)) : 1.0; }

// A power of two that keeps squared differences from x in range.
template <class T>
double scale_of(const T* x, int64_t D) {
  double largest = 0;
  for (int64_t d = 0; d < D; ++d) largest = std::max(largest, std::abs(static_cast<double>(x[d])));
  return scale_for(largest);
}

// Squares of x, in units of 1 / scale, of which a rounding error is nothing.
template <class T>
double nothing_beside(const T* x, double scale, int64_t D) {
  double squares = 0;
  for (int64_t d = 0; d < D; ++d) squares += x[d] * scale * (x[d] * scale);
  return kNothing * squares;
}

// Of `count` clusters by rising id, `stride` apart, with their distances, the nearest: `current` if it ties, else the
// lowest id; `current` if no distance is a number.
int64_t first_of_nearest(const int64_t* clusters, int64_t stride, const double* distances, int64_t count,
                         double nothing, int64_t current) {
  double least = std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < count; ++i) least = std::min(least, distances[i]);
  const double bound = std::max(least * (1 + kTie), nothing);
  int64_t first = current;
  for (int64_t i = count - 1; i >= 0; --i) {
    if (!(distances[i] <= bound)) continue;
    first = clusters[i * stride];
    if (first == current) break;
  }
  return first;
}

// Points of each of K labels, in order: `order` from begin[c] to begin[c + 1].
struct Grouping {
  std::vector<int64_t> begin, order;

  Grouping(const int64_t* labels, int64_t n, int64_t K) : begin(K + 1, 0), order(n) {
    for (int64_t j = 0; j < n; ++j) ++begin[labels[j] + 1];
    std::partial_sum(begin.begin(), begin.end(), begin.begin());
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t j = 0; j < n; ++j) order[next[labels[j]]++] = j;
  }
};

// mean (D) = weighted mean of the listed rows. Weights become shares first: the mean of one point is that point.
template <class T>
void weighted_mean(const T* x, const double* w, const int64_t* begin, const int64_t* end, int64_t D, double* mean) {
  double total = 0, ignored = 0;
  for (const int64_t* j = begin; j != end; ++j) total += w[*j];
  std::fill_n(mean, D, 0.0);
  for (const int64_t* j = begin; j != end; ++j) add_row(x + *j * D, w[*j] / total, D, mean, &ignored);
}

}  // namespace

template <class T>
void prepare_points(const T* x, const double* w, int64_t batch, int64_t n, int64_t D, int64_t stride, T* out,
                    double* offset, double* scale) {
  const int64_t strips = (D + kColumns - 1) / kColumns;
  std::vector<double> squares(batch * strips), largest(batch * strips), total(batch);
  for (int64_t b = 0; b < batch; ++b) total[b] = std::accumulate(w + b * n, w + (b + 1) * n, 0.0);

  for_each(batch * strips, [&](int64_t item) {
    const int64_t b = item / strips, begin = item % strips * kColumns, width = std::min(kColumns, D - begin);
    double mean[kColumns] = {};
    for (int64_t j = 0; j < n; ++j) {
      squares[item] += add_row(x + (b * n + j) * D + begin, w[b * n + j] / total[b], width, mean, &largest[item]);
    }
    std::copy_n(mean, width, offset + b * D + begin);
  });
  for (int64_t b = 0; b < batch; ++b) {
    const auto first = squares.begin() + b * strips;
    const bool finite = std::isfinite(std::accumulate(first, first + strips, 0.0));
    const double most = *std::max_element(largest.begin() + b * strips, largest.begin() + (b + 1) * strips);
    scale[b] = finite ? scale_for(most) : std::numeric_limits<double>::quiet_NaN();
  }

  const int64_t groups = (n + kRows - 1) / kRows;
  for_each(batch * groups, [&](int64_t item) {
    const int64_t b = item / groups, begin = item % groups * kRows;
    if (std::isnan(scale[b])) return;
    for (int64_t j = begin; j < std::min(begin + kRows, n); ++j) {
      T* row = out + (b * n + j) * stride;
      centre_row(x + (b * n + j) * D, offset + b * D, scale[b], D, row);
      std::fill(row + D, row + stride, T{0});
    }
  });
}

template <class T>
void finish_clusters(const T* x, const double* w, const int64_t* labels, const int64_t* offsets, const int64_t* members,
                     const T* fallback, int64_t batch, int64_t n, int64_t D, int64_t K, T* centroids, double* inertia) {
  std::vector<double> parts(batch * K);
  std::vector<Grouping> groupings;
  groupings.reserve(batch);
  for (int64_t b = 0; b < batch; ++b) groupings.emplace_back(labels + b * n, n, K);

  for_each(batch * K, [&](int64_t item) {
    const int64_t b = item / K, c = item % K;
    const T* points = x + b * n * D;
    const int64_t *begin = members + offsets[b * (K + 1) + c], *end = members + offsets[b * (K + 1) + c + 1];
    std::vector<double> mean(D, 0.0);
    if (begin != end) {
      weighted_mean(points, w + b * n, begin, end, D, mean.data());
    } else if (fallback != nullptr) {
      std::copy_n(fallback + item * D, D, mean.begin());
    }
    for (int64_t d = 0; d < D; ++d) centroids[item * D + d] = static_cast<T>(mean[d]);
    const Grouping& grouping = groupings[b];
    for (int64_t i = grouping.begin[c]; i < grouping.begin[c + 1]; ++i) {
      const int64_t j = grouping.order[i];
      parts[item] += w[b * n + j] * squared_distance(points + j * D, mean.data(), D);
    }
  });
  for (int64_t b = 0; b < batch; ++b) {
    inertia[b] = std::accumulate(parts.begin() + b * K, parts.begin() + (b + 1) * K, 0.0);
  }
}

template <class In, class Out>
void cluster_means(const In* x, const double* w, const int64_t* labels, int64_t batch, int64_t n, int64_t D, int64_t K,
                   Out* means) {
  std::vector<Grouping> groupings;
  groupings.reserve(batch);
  for (int64_t b = 0; b < batch; ++b) groupings.emplace_back(labels + b * n, n, K);
  const int64_t whole = D / kPad * kPad, groups = (K + kRows - 1) / kRows;
  for_each(batch * groups, [&](int64_t item) {
    const int64_t b = item / groups, first = item % groups * kRows;
    std::vector<double> sum(D), share;
    std::vector<const In*> rows;
    for (int64_t c = first; c < std::min(first + kRows, K); ++c) {
      rows.clear();
      share.clear();
      for (int64_t i = groupings[b].begin[c]; i < groupings[b].begin[c + 1]; ++i) {
        const int64_t j = groupings[b].order[i];
        if (w[b * n + j] == 0) continue;
        rows.push_back(x + (b * n + j) * D);
        share.push_back(w[b * n + j]);
      }
      Out* mean = means + (b * K + c) * D;
      const int64_t count = rows.size();
      if (count < 2) {
        count == 0 ? static_cast<void>(std::fill_n(mean, D, Out{0})) : widen(rows[0], D, mean);
        continue;
      }
      const double total = std::accumulate(share.begin(), share.end(), 0.0);
      add_rows(rows.data(), share.data(), count, whole, true, sum.data());
      scale_row(sum.data(), whole, 1 / total, 0.0, mean);
      for (int64_t d = whole; d < D; ++d) {
        double own = 0;
        for (int64_t i = 0; i < count; ++i) {
          Out value;
          widen(rows[i] + d, 1, &value);
          own += share[i] * value;
        }
        mean[d] = static_cast<Out>(own * (1 / total));
      }
    }
  });
}

template <class T>
void nearest_centroids(const T* x, const T* centroids, int64_t batch, int64_t n, int64_t K, int64_t D,
                       int64_t* labels) {
  // The nearest centroid minimises |c|^2 - 2 x . c in any coordinates: the centroids' mean and scale keep it accurate.
  const int64_t stride = padded(D);
  std::vector<double> offset(batch * D), scale(batch), norms(batch * K), ones(batch * K, 1.0);
  std::unique_ptr<T[]> centred(new T[batch * K * stride]);
  prepare_points(centroids, ones.data(), batch, K, D, stride, centred.get(), offset.data(), scale.data());
  const std::vector<double> origin(stride, 0.0);
  std::vector<T> blurs(batch * K);
  for (int64_t i = 0; i < batch * K; ++i) {
    norms[i] = squared_distance(centred.get() + i * stride, origin.data(), stride);
    blurs[i] = static_cast<T>(kBlur<T> * norms[i]);
  }

  const int64_t rows = std::clamp(kBlockEntries / K / kPad * kPad, kLeastRows, kMostRows);
  const int64_t blocks = (n + rows - 1) / rows;
  for_each_alone(batch * blocks, [&](int64_t item) {
    const int64_t b = item / blocks, begin = item % blocks * rows, count = std::min(rows, n - begin);
    const int64_t width = padded(count);
    if (std::isnan(scale[b])) {
      std::fill_n(labels + b * n + begin, count, 0);
      return;
    }
    std::unique_ptr<T[]> points(new T[width * stride]), v(new T[K * width]);
    T bound[kMostRows], sq[kMostRows];
    Index nearest[kMostRows] = {};
    for (int64_t j = 0; j < width; ++j) {
      T* row = points.get() + j * stride;
      std::fill(row, row + stride, T{0});
      if (j < count) centre_row(x + (b * n + begin + j) * D, offset.data() + b * D, scale[b], D, row);
      sq[j] = static_cast<T>(squared_distance(row, origin.data(), stride));
    }
    multiply_transposed(centred.get() + b * K * stride, K, stride, points.get(), width, stride, stride, v.get(), width);
    for (int64_t c = 0; c < K; ++c) {
      const T norm = static_cast<T>(norms[b * K + c]);
      for (int64_t j = 0; j < width; ++j) v[c * width + j] = norm - 2 * v[c * width + j];
    }
    column_minimum(v.get(), width, K, width, bound);
    for (int64_t j = 0; j < width; ++j) {
      // No nearest centroid is longer than point and distance together.
      const T length = 2 * (sq[j] + std::max(T{0}, sq[j] + bound[j]));
      bound[j] += static_cast<T>(kBlur<T>) * (2 * sq[j] + length);
    }
    first_within(v.get(), width, K, width, bound, nearest);
    Index within[kMostRows] = {};
    count_within(v.get(), width, K, width, blurs.data() + b * K, bound, within);
    std::vector<int64_t> clusters;
    std::vector<double> distances;
    for (int64_t j = 0; j < count; ++j) {
      labels[b * n + begin + j] = nearest[j];
      const bool known = std::isfinite(bound[j]);
      if (known && within[j] < 2) continue;
      clusters.clear();
      distances.clear();
      const T* point = x + (b * n + begin + j) * D;
      const double unit = known ? scale[b] : scale_of(point, D);
      for (int64_t c = 0; c < K; ++c) {
        if (known && v[c * width + j] - blurs[b * K + c] > bound[j]) continue;
        clusters.push_back(c);
        distances.push_back(exact_distance(point, centroids + (b * K + c) * D, unit, D));
      }
      labels[b * n + begin + j] = first_of_nearest(clusters.data(), 1, distances.data(), clusters.size(),
                                                       nothing_beside(point, unit, D), 0);
    }
  });
}

template <class T>
void decide_doubts(const T* x, const T* centroids, int64_t n, int64_t K, int64_t D, const int64_t* doubts, int64_t count,
                   int64_t* labels) {
  std::vector<double> distances(count);
  for_each_if(count * D >= kWorthThreads, (count + kRows - 1) / kRows, [&](int64_t item) {
    for (int64_t i = item * kRows; i < std::min((item + 1) * kRows, count); ++i) {
      const int64_t b = doubts[3 * i], j = doubts[3 * i + 1], c = doubts[3 * i + 2];
      const T* point = x + (b * n + j) * D;
      distances[i] = exact_distance(point, centroids + (b * K + c) * D, scale_of(point, D), D);
    }
  });
  for (int64_t i = 0, end; i < count; i = end) {
    for (end = i + 1; end < count && std::equal(doubts + 3 * i, doubts + 3 * i + 2, doubts + 3 * end);) ++end;
    const int64_t row = doubts[3 * i] * n + doubts[3 * i + 1];
    const T* point = x + row * D;
    const double nothing = nothing_beside(point, scale_of(point, D), D);
    labels[row] = first_of_nearest(doubts + 3 * i + 2, 3, distances.data() + i, end - i, nothing, labels[row]);
  }
}

template void decide_doubts(const float*, const float*, int64_t, int64_t, int64_t, const int64_t*, int64_t, int64_t*);
template void decide_doubts(const double*, const double*, int64_t, int64_t, int64_t, const int64_t*, int64_t, int64_t*);
template void prepare_points(const float*, const double*, int64_t, int64_t, int64_t, int64_t, float*, double*, double*);
template void prepare_points(const double*, const double*, int64_t, int64_t, int64_t, int64_t, double*, double*,
                             double*);
template void finish_clusters(const float*, const double*, const int64_t*, const int64_t*, const int64_t*, const float*,
                              int64_t, int64_t, int64_t, int64_t, float*, double*);
template void finish_clusters(const double*, const double*, const int64_t*, const int64_t*, const int64_t*,
                              const double*, int64_t, int64_t, int64_t, int64_t, double*, double*);
template void cluster_means(const uint16_t*, const double*, const int64_t*, int64_t, int64_t, int64_t, int64_t, float*);
template void cluster_means(const float*, const double*, const int64_t*, int64_t, int64_t, int64_t, int64_t, float*);
template void cluster_means(const double*, const double*, const int64_t*, int64_t, int64_t, int64_t, int64_t, double*);
template void nearest_centroids(const float*, const float*, int64_t, int64_t, int64_t, int64_t, int64_t*);
template void nearest_centroids(const double*, const double*, int64_t, int64_t, int64_t, int64_t, int64_t*);

}  // namespace mlp_fusion
