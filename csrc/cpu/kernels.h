// The hot loops of k-means on a Gram matrix, each over one tile of columns.
//
// Widths are multiples of kPad; `v` is the tile's first column of the matrix V of kmeans.h, `stride` apart from row to
// row. Sums of many terms are taken in double, whatever the element type T is (float or double): converting costs less
// than waiting for memory.
#pragma once

#include <cstdint>

#include "simd.h"

namespace mlp_fusion {

// Columns of a tile: one row of it in double is 4 KiB.
constexpr int64_t kTile = 512;
// Columns for which a seeding keeps a partial sum of its mass.
constexpr int64_t kBlock = 64;
// Candidates whose potentials one pass over the points computes.
constexpr int64_t kTrials = 4;

// sum[j] += sum_i w[i] rows[i][j], the terms in order of i; `first` overwrites instead.
void add_rows(const float* const* rows, const double* w, int64_t count, int64_t width, bool first, double* sum);
void add_rows(const double* const* rows, const double* w, int64_t count, int64_t width, bool first, double* sum);
// Rows of bfloat16, by their bits.
void add_rows(const uint16_t* const* rows, const double* w, int64_t count, int64_t width, bool first, double* sum);
// out[j] = shift + scale * sum[j].
void scale_row(const double* sum, int64_t width, double scale, double shift, float* out);
void scale_row(const double* sum, int64_t width, double scale, double shift, double* out);

// least[j] = min over the K rows c of v[c][j].
void column_minimum(const float* v, int64_t stride, int64_t K, int64_t width, float* least);
void column_minimum(const double* v, int64_t stride, int64_t K, int64_t width, double* least);

// first[j] = the smallest c with v[c][j] <= bound[j]; unchanged where there is none.
void first_within(const float* v, int64_t stride, int64_t K, int64_t width, const float* bound, int32_t* first);
void first_within(const double* v, int64_t stride, int64_t K, int64_t width, const double* bound, int32_t* first);

// count[j] += the number of rows c with v[c][j] - blur[c] <= bound[j].
void count_within(const float* v, int64_t stride, int64_t K, int64_t width, const float* blur, const float* bound,
                  int32_t* count);
void count_within(const double* v, int64_t stride, int64_t K, int64_t width, const double* blur, const double* bound,
                  int32_t* count);

// Lower (cost, target)[j], in lexicographic order, to the cheapest of the given clusters that are neither the point's own
// nor its target, and second[j] to the cheapest that is not taken. The cost of entering c is (v[c][j] + sq[j]) *
// factor[c], or W[c] / (W[c] + w[j]) in place of the factor when `factor` is null; both have an entry per cluster.
template <class T>
struct Entry {
  const T* v;
  int64_t stride;
  const int32_t* clusters;
  int64_t count;
  int64_t width;
  const T* sq;
  const int32_t* labels;
  const T* factor;
  const double* W;
  const double* w;
  T* cost;
  int32_t* target;
  T* second;
};
void cheapest_entry(const Entry<float>& entry);
void cheapest_entry(const Entry<double>& entry);

// The state of one seeding, all of length `width`: squared distance to the closest seed, weight, squared norm.
template <class T>
struct Seeding {
  double* closest;
  const double* w;
  const T* sq;
  double slack;  // relative to sq: distances of no more than slack * sq are 0
  int64_t width;
};
// potential[t] = sum_j w[j] min(closest[j], |x_j - x_t|^2) for `count` <= kTrials candidates, given their rows of G and
// squared norms.
void potentials(const Seeding<float>& state, const float* const* rows, const double* norms, int64_t count,
                double* potential);
void potentials(const Seeding<double>& state, const double* const* rows, const double* norms, int64_t count,
                double* potential);
// closest[j] = min(closest[j], |x_j - x_s|^2), and block[i] = sum of w * closest over the i-th kBlock columns.
void take_seed(const Seeding<float>& state, const float* row, double norm, double* block);
void take_seed(const Seeding<double>& state, const double* row, double norm, double* block);

// One row of points: sum[j] += w * x[j]; returns the sum of squares of the row and raises *largest to its largest
// magnitude. Not finite if an element is not.
double add_row(const float* x, double w, int64_t width, double* sum, double* largest);
double add_row(const double* x, double w, int64_t width, double* sum, double* largest);

// Four rows, floats or the bits of bfloat16: sum[j] += each x[i][j], and squares[i] += the squares of row i.
void add_four(const float* x, int64_t stride, int64_t width, double* sum, double* squares);
void add_four(const uint16_t* x, int64_t stride, int64_t width, double* sum, double* squares);

// sum_j (x[j] - centre[j])^2.
double squared_distance(const float* x, const double* centre, int64_t width);
double squared_distance(const double* x, const double* centre, int64_t width);

// sum_j ((x[j] - centre[j]) * scale)^2, every difference and the sum in double.
double exact_distance(const float* x, const float* centre, double scale, int64_t width);
double exact_distance(const double* x, const double* centre, double scale, int64_t width);

// out[j] = (x[j] - offset[j]) * scale.
void centre_row(const float* x, const double* offset, double scale, int64_t width, float* out);
void centre_row(const double* x, const double* offset, double scale, int64_t width, double* out);

}  // namespace mlp_fusion
