#include "mlp_few.h"

#include <algorithm>

#include "parallel.h"
#include "simd.h"

namespace mlp_fusion {
namespace {

constexpr int64_t kWidth = 8;
// Columns of x that are summed one after the other, in every lane of a vector an eighth of them; then sums are summed.
constexpr int64_t kSummed = 256;
// Rows of w that one thread takes at a time, a multiple of what every tile takes, and the multiplications for which
// threads are woken.
constexpr int64_t kPiece = 48, kWorthThreads = 1 << 17;

MLP_INLINE float sum(Float8 v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// The products of Rows rows of x and Columns rows of w. Their sums are kept in registers, of which AVX2 has 16.
template <int Rows, int Columns>
MLP_INLINE void tile(const float* x, int64_t x_stride, const float* w, int64_t w_stride, int64_t depth,
                     const float* bias, float* out, int64_t out_stride) {
  Float8 totals[Rows][Columns] = {};
  const int64_t whole = depth / kWidth * kWidth;
  for (int64_t begin = 0; begin < whole; begin += kSummed) {
    Float8 sums[Rows][Columns] = {};
    for (int64_t k = begin, end = std::min(begin + kSummed, whole); k < end; k += kWidth) {
      Float8 right[Columns];
#pragma GCC unroll 12
      for (int j = 0; j < Columns; ++j) right[j] = load<Float8>(w + j * w_stride + k);
#pragma GCC unroll 12
      for (int i = 0; i < Rows; ++i) {
        const Float8 left = load<Float8>(x + i * x_stride + k);
#pragma GCC unroll 12
        for (int j = 0; j < Columns; ++j) sums[i][j] += left * right[j];
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 12
      for (int j = 0; j < Columns; ++j) totals[i][j] += sums[i][j];
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < Columns; ++j) {
      float rest = bias == nullptr ? 0.0f : bias[j];
      for (int64_t k = whole; k < depth; ++k) rest += x[i * x_stride + k] * w[j * w_stride + k];
      out[i * out_stride + j] = sum(totals[i][j]) + rest;
    }
  }
}

// Rows rows of x and all `columns` rows of w, as many at a time as fit the registers.
template <int Rows, int Columns>
MLP_INLINE void rows_of_tiles(const float* x, int64_t x_stride, const float* w, int64_t w_stride, int64_t columns,
                              int64_t depth, const float* bias, float* out, int64_t out_stride) {
  int64_t j = 0;
  for (; j + Columns <= columns; j += Columns) {
    tile<Rows, Columns>(x, x_stride, w + j * w_stride, w_stride, depth, bias == nullptr ? bias : bias + j, out + j,
                        out_stride);
  }
  for (; j < columns; ++j) {
    tile<Rows, 1>(x, x_stride, w + j * w_stride, w_stride, depth, bias == nullptr ? bias : bias + j, out + j,
                  out_stride);
  }
}

MLP_CLONES static void piece(const float* x, int64_t rows, int64_t x_stride, const float* w, int64_t columns,
                             int64_t w_stride, int64_t depth, const float* bias, float* out, int64_t out_stride) {
  // All rows of x on a few rows of w, which then are in the nearest cache.
  constexpr int64_t kColumns = 12;
  for (int64_t j = 0; j < columns; j += kColumns) {
    const int64_t count = std::min(kColumns, columns - j);
    const float *some = w + j * w_stride, *biases = bias == nullptr ? bias : bias + j;
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) {
      rows_of_tiles<4, 3>(x + i * x_stride, x_stride, some, w_stride, count, depth, biases, out + i * out_stride + j,
                          out_stride);
    }
    const float* rest = x + i * x_stride;
    float* to = out + i * out_stride + j;
    if (rows - i == 3) rows_of_tiles<3, 3>(rest, x_stride, some, w_stride, count, depth, biases, to, out_stride);
    if (rows - i == 2) rows_of_tiles<2, 4>(rest, x_stride, some, w_stride, count, depth, biases, to, out_stride);
    if (rows - i == 1) rows_of_tiles<1, 12>(rest, x_stride, some, w_stride, count, depth, biases, to, out_stride);
  }
}

}  // namespace

void project_few(const Matrix<float>& out, const Matrix<float>& x, const Matrix<float>& w, const float* bias) {
  const int64_t pieces = (w.rows + kPiece - 1) / kPiece;
  const bool worth = x.rows * w.rows * x.columns > kWorthThreads && torch::stable::get_num_threads() > 1;
  for_each_if(worth, pieces, [&](int64_t i) {
    const int64_t begin = i * kPiece, count = std::min(kPiece, w.rows - begin);
    piece(x.data, x.rows, x.row_stride, w.data + begin * w.row_stride, count, w.row_stride, x.columns,
          bias == nullptr ? bias : bias + begin, out.data + begin, out.row_stride);
  });
}

}  // namespace mlp_fusion
