// Sums over rows of two kernels A and B that lie in memory side by side: the strip of a comparison that streams.
//
// In a symmetric comparison the strip has the columns up to its last row. Values above the diagonal are not read, and those
// below it stand for their mirror images too: twice in the inner products, and in the sums of rows of both.
#pragma once

#include "layout.h"

namespace mlp_fusion::cuda {

template <class T>
struct Strip {
  const T *a, *b;  // (rows, columns), with the given distance between rows
  int64_t rows, columns, stride;
  int64_t first;  // the number of its first row in the kernels
  bool symmetric;
  double *sums, *of_rows, *of_columns;  // (groups, 4); (2, rows); (2, columns): added to
  int64_t row_stride, column_stride;    // between A's and B's
};

namespace strips {

constexpr int kThreads = 128;  // of both kernels; a group is that many columns, one per thread

MLP_HD int64_t groups(int64_t columns) { return (columns + kThreads - 1) / kThreads; }

// <A, A>, <A, B>, <B, B> and |A - B|² of one column, whose sums are added to where they belong.
struct Products {
  double value[4];
};

template <class T>
MLP_HD Products column_products(const Strip<T>& s, int64_t column) {
  Products total = {};
  double of_a = 0, of_b = 0;
  const int64_t begin = s.symmetric && column > s.first ? column - s.first : 0;
  for (int64_t row = begin; row < s.rows; ++row) {
    const double u = s.a[row * s.stride + column], v = s.b[row * s.stride + column];
    const bool mirrored = s.symmetric && s.first + row > column;
    const double weight = mirrored ? 2 : 1;
    total.value[0] += weight * u * u;
    total.value[1] += weight * u * v;
    total.value[2] += weight * v * v;
    total.value[3] += weight * (u - v) * (u - v);
    if (mirrored || !s.symmetric) {
      of_a += u;
      of_b += v;
    }
  }
  s.of_columns[column] += of_a;
  s.of_columns[s.column_stride + column] += of_b;
  return total;
}

// What one thread adds to the sums of one row.
struct Margins {
  double a, b;
};

template <class T>
MLP_HD Margins row_margins(const Strip<T>& s, int64_t row, int thread) {
  Margins total = {};
  const int64_t end = s.symmetric ? least(s.columns, s.first + row + 1) : s.columns;
  for (int64_t column = thread; column < end; column += kThreads) {
    total.a += s.a[row * s.stride + column];
    total.b += s.b[row * s.stride + column];
  }
  return total;
}

}  // namespace strips
}  // namespace mlp_fusion::cuda
