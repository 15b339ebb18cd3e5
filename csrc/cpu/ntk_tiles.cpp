// Tiles of a tangent kernel: the products of inputs, hidden values and slopes of a few hundred rows each, combined while
// they lie in the cache. Every tile is computed by one thread, so that nothing depends on how many there are.
#include <algorithm>
#include <memory>
#include <vector>

#include "ntk.h"
#include "parallel.h"
#include "products.h"
#include "simd.h"

namespace mlp_fusion {
namespace {

// Tiles whose sums are kept until they are added up in order: enough for every thread, and a few MB.
constexpr int64_t kWave = 512;
// Edge of the squares that the diagonal of a symmetric kernel is made of: the smallest whose products are fast.
constexpr int64_t kLeast = 64;
// Edge of the squares that are transposed at a time: a line of the cache of float.
constexpr int64_t kSquare = 16;

// to = before + constant + (e + bias) ∘ s for rows of the tile, dense but for `to`. Null before: zeros; null e: only the
// bias; null s: neither.
template <class T>
MLP_INLINE void combine_body(const T* before, const T* e, const T* s, T bias, T constant, int64_t rows, int64_t columns,
                             T* to, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i, to += stride) {
    const int64_t row = i * columns;
    for (int64_t j = 0; j < columns; ++j) {
      T value = constant;
      if (before != nullptr) value += before[row + j];
      if (s != nullptr) value += ((e != nullptr ? e[row + j] : T(0)) + bias) * s[row + j];
      to[j] = value;
    }
  }
}

// to (columns, rows) = from (rows, columns) transposed.
template <class T>
MLP_INLINE void transpose_body(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to,
                               int64_t to_stride) {
  for (int64_t j0 = 0; j0 < columns; j0 += kSquare) {
    for (int64_t i0 = 0; i0 < rows; i0 += kSquare) {
      const int64_t i1 = std::min(i0 + kSquare, rows), j1 = std::min(j0 + kSquare, columns);
      for (int64_t j = j0; j < j1; ++j) {
        for (int64_t i = i0; i < i1; ++i) to[j * to_stride + i] = from[i * from_stride + j];
      }
    }
  }
}

// sums += <a, a>, <a, b>, <b, b> and |a - b|², in double.
template <class T>
MLP_INLINE void add_sums_body(const T* a, const T* b, int64_t n, double* sums) {
  Double8 aa{}, ab{}, bb{}, dd{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Double8 u = load_double(a + i), v = load_double(b + i);
    aa += u * u;
    ab += u * v;
    bb += v * v;
    dd += (u - v) * (u - v);
  }
  double total[4] = {sum(aa), sum(ab), sum(bb), sum(dd)};
  for (; i < n; ++i) {
    const double u = a[i], v = b[i];
    total[0] += u * u;
    total[1] += u * v;
    total[2] += v * v;
    total[3] += (u - v) * (u - v);
  }
  for (int64_t k = 0; k < 4; ++k) sums[k] += total[k];
}

// to_rows and to_columns += the sums of the rows and columns of a dense tile, in double.
template <class T>
MLP_INLINE void add_margins_body(const T* tile, int64_t rows, int64_t columns, double* to_rows, double* to_columns) {
  for (int64_t i = 0; i < rows; ++i, tile += columns) {
    Double8 lanes{};
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) {
      const Double8 u = load_double(tile + j);
      lanes += u;
      store_double(to_columns + j, load_double(to_columns + j) + u);
    }
    double total = sum(lanes);
    for (; j < columns; ++j) {
      total += tile[j];
      to_columns[j] += tile[j];
    }
    to_rows[i] += total;
  }
}

#define MLP_DEFINE(T)                                                                                                \
  MLP_CLONES void combine(const T* before, const T* e, const T* s, T bias, T constant, int64_t rows,                 \
                          int64_t columns, T* to, int64_t stride) {                                                  \
    combine_body(before, e, s, bias, constant, rows, columns, to, stride);                                           \
  }                                                                                                                  \
  MLP_CLONES void transpose(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to,                \
                            int64_t to_stride) {                                                                     \
    transpose_body(from, from_stride, rows, columns, to, to_stride);                                                 \
  }                                                                                                                  \
  MLP_CLONES void add_sums(const T* a, const T* b, int64_t n, double* sums) { add_sums_body(a, b, n, sums); }        \
  MLP_CLONES void add_margins(const T* tile, int64_t rows, int64_t columns, double* to_rows, double* to_columns) {   \
    add_margins_body(tile, rows, columns, to_rows, to_columns);                                                      \
  }
MLP_DEFINE(float)
MLP_DEFINE(double)
#undef MLP_DEFINE

// Rows [i, i + rows) of one side and [j, j + columns) of the other.
struct Tile {
  int64_t i, j, rows, columns;
};

// The tiles of rows [i, i + rows) and columns [j, j + columns), row by row.
void add_rectangle(int64_t i, int64_t j, int64_t rows, int64_t columns, int64_t edge, std::vector<Tile>& tiles) {
  for (int64_t down = 0; down < rows; down += edge) {
    for (int64_t across = 0; across < columns; across += edge) {
      tiles.push_back({i + down, j + across, std::min(edge, rows - down), std::min(edge, columns - across)});
    }
  }
}

// The tiles of the n rows from `begin` on and as many columns, on and below the diagonal: the square below the diagonal of
// two halves, then the halves in turn. The few values above the diagonal that are computed too are in small squares.
void add_triangle(int64_t begin, int64_t n, int64_t edge, std::vector<Tile>& tiles) {
  const int64_t smallest = std::min(edge, kLeast);
  if (n <= smallest) {
    if (n > 0) tiles.push_back({begin, begin, n, n});
    return;
  }
  const int64_t half = (n / 2 + smallest - 1) / smallest * smallest;
  add_rectangle(begin + half, begin, n - half, half, edge, tiles);
  add_triangle(begin, half, edge, tiles);
  add_triangle(begin + half, n - half, edge, tiles);
}

// The tiles of an (n1, n2) matrix; of a symmetric one, those that reach the diagonal or lie below it. The largest come
// first, so that threads finish together.
std::vector<Tile> tiles_of(int64_t n1, int64_t n2, bool symmetric, int64_t edge) {
  std::vector<Tile> tiles;
  if (symmetric) {
    add_triangle(0, n1, edge, tiles);
  } else {
    add_rectangle(0, 0, n1, n2, edge, tiles);
  }
  std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& one, const Tile& other) {
    return one.rows * one.columns > other.rows * other.columns;
  });
  return tiles;
}

template <class T>
bool needs_inputs(const TangentKernel<T>& kernel) {
  return std::any_of(kernel.terms.begin(), kernel.terms.end(), [](const Term& term) { return term.weights; });
}

// One tile of x1 x2ᵀ, dense.
template <class T>
void inputs_tile(const TangentKernel<T>& kernel, const Tile& t, T* e) {
  const int64_t d = kernel.d;
  multiply_transposed(kernel.left.x + t.i * d, t.rows, d, kernel.right.x + t.j * d, t.columns, d, d, e, t.columns);
}

// One tile of the kernel from that of x1 x2ᵀ, written to `to` with the given distance between rows; `product` and
// `total` are scratch of the tile's size.
template <class T>
void kernel_tile(const TangentKernel<T>& kernel, const Tile& t, const T* e, T* product, T* total, T* to,
                 int64_t stride) {
  const int64_t h = kernel.h, width = kernel.width;
  const T* before = nullptr;
  if (kernel.left.hidden != nullptr) {
    multiply_transposed(kernel.left.hidden + t.i * h, t.rows, h, kernel.right.hidden + t.j * h, t.columns, h, h, total,
                        t.columns);
    before = total;
  }
  T constant = kernel.constant;
  for (size_t k = 0; k < kernel.terms.size(); ++k) {
    const Term& term = kernel.terms[k];
    const bool last = k + 1 == kernel.terms.size();
    multiply_transposed(kernel.left.slopes + t.i * width + term.begin, t.rows, width,
                        kernel.right.slopes + t.j * width + term.begin, t.columns, width, term.columns, product,
                        t.columns);
    combine(before, term.weights ? e : nullptr, product, T(term.bias), constant, t.rows, t.columns, last ? to : total,
            last ? stride : t.columns);
    before = total;
    constant = T{0};
  }
  if (kernel.terms.empty()) {
    combine(before, static_cast<const T*>(nullptr), static_cast<const T*>(nullptr), T{0}, constant, t.rows, t.columns,
            to, stride);
  }
}

}  // namespace

template <class T>
void kernel_matrix(const TangentKernel<T>& kernel, int64_t n1, int64_t n2, bool symmetric, int64_t tile, T* out,
                   int64_t stride) {
  const std::vector<Tile> tiles = tiles_of(n1, n2, symmetric, tile);
  const bool with_inputs = needs_inputs(kernel);
  for_each_alone(static_cast<int64_t>(tiles.size()), [&](int64_t item) {
    const Tile& t = tiles[item];
    const std::unique_ptr<T[]> scratch(new T[3 * t.rows * t.columns]);
    T *const e = scratch.get(), *const product = e + t.rows * t.columns, *const total = product + t.rows * t.columns;
    if (with_inputs) inputs_tile(kernel, t, e);
    T* const to = out + t.i * stride + t.j;
    if (!symmetric || t.i == t.j) {
      kernel_tile(kernel, t, e, product, total, to, stride);
      if (!symmetric) return;
      for (int64_t i = 0; i < t.rows; ++i) {
        for (int64_t j = 0; j < i; ++j) to[j * stride + i] = to[i * stride + j];
      }
      return;
    }
    // Both places are written from a dense tile: the rows of `out` may be a power of two apart, which read column by
    // column would compete for the same few lines of the cache.
    kernel_tile(kernel, t, e, product, total, total, t.columns);
    for (int64_t i = 0; i < t.rows; ++i) std::copy_n(total + i * t.columns, t.columns, to + i * stride);
    transpose(total, t.columns, t.rows, t.columns, out + t.j * stride + t.i, stride);
  });
}

template <class T>
void kernel_sums(const TangentKernel<T>& a, const TangentKernel<T>& b, int64_t n1, int64_t n2, bool symmetric,
                 int64_t tile, double* sums, double* rows, double* columns) {
  const std::vector<Tile> tiles = tiles_of(n1, n2, symmetric, tile);
  const int64_t count = static_cast<int64_t>(tiles.size()), edge = std::min(tile, std::max(n1, n2));
  const bool with_inputs = needs_inputs(a) || needs_inputs(b);
  std::fill_n(sums, 4, 0.0);
  std::fill_n(rows, 2 * n1, 0.0);
  std::fill_n(columns, 2 * n2, 0.0);
  // Of a tile: the four sums, then those of the rows and of the columns of each kernel.
  const int64_t width = 4 + 4 * edge;
  std::vector<double> wave(std::min(count, kWave) * width);
  for (int64_t begin = 0; begin < count; begin += kWave) {
    const int64_t length = std::min(kWave, count - begin);
    std::fill_n(wave.data(), length * width, 0.0);
    for_each_alone(length, [&](int64_t item) {
      const Tile& t = tiles[begin + item];
      const int64_t size = t.rows * t.columns;
      const std::unique_ptr<T[]> scratch(new T[5 * size]);
      T *const e = scratch.get(), *const product = e + size, *const total = product + size;
      T *const of_a = total + size, *const of_b = of_a + size;
      if (with_inputs) inputs_tile(a, t, e);
      kernel_tile(a, t, e, product, total, of_a, t.columns);
      kernel_tile(b, t, e, product, total, of_b, t.columns);
      double *const to = wave.data() + item * width, *const margins = to + 4;
      add_sums(of_a, of_b, size, to);
      add_margins(of_a, t.rows, t.columns, margins, margins + edge);
      add_margins(of_b, t.rows, t.columns, margins + 2 * edge, margins + 3 * edge);
    });
    for (int64_t item = 0; item < length; ++item) {
      const Tile& t = tiles[begin + item];
      const double* const from = wave.data() + item * width;
      const bool mirrored = symmetric && t.i != t.j;
      for (int64_t k = 0; k < 4; ++k) sums[k] += (mirrored ? 2.0 : 1.0) * from[k];
      for (int64_t k = 0; k < 2; ++k) {
        const double *const of_rows = from + 4 + 2 * k * edge, *const of_columns = of_rows + edge;
        double *const to_rows = rows + k * n1, *const to_columns = columns + k * n2;
        for (int64_t i = 0; i < t.rows; ++i) to_rows[t.i + i] += of_rows[i];
        for (int64_t j = 0; j < t.columns; ++j) to_columns[t.j + j] += of_columns[j];
        if (!mirrored) continue;
        for (int64_t i = 0; i < t.rows; ++i) to_columns[t.i + i] += of_rows[i];
        for (int64_t j = 0; j < t.columns; ++j) to_rows[t.j + j] += of_columns[j];
      }
    }
  }
}

template void kernel_matrix(const TangentKernel<float>&, int64_t, int64_t, bool, int64_t, float*, int64_t);
template void kernel_matrix(const TangentKernel<double>&, int64_t, int64_t, bool, int64_t, double*, int64_t);
template void kernel_sums(const TangentKernel<float>&, const TangentKernel<float>&, int64_t, int64_t, bool, int64_t,
                          double*, double*, double*);
template void kernel_sums(const TangentKernel<double>&, const TangentKernel<double>&, int64_t, int64_t, bool, int64_t,
                          double*, double*, double*);

}  // namespace mlp_fusion
