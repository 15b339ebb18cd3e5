#include "gemm.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <string_view>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace mlp_fusion {
namespace {

// Terms that are summed in a register before they are added to the rest. They are as many as MKL's, so that rounding
// errors are of the same size; b's panels of that depth stream from the second-level cache, a's rows stay in the first.
constexpr int64_t kDepth = 192;
// Columns of b that are packed at once: 384 KiB.
constexpr int64_t kColumns = 512;
// Rows of a that are packed at once, where that is worth it, and how far apart: not by what a cache takes for the same
// place.
constexpr int64_t kRows = 56, kApart = kDepth + 16;
// Strides in elements whose multiples put the rows of a tile into the same few places of a cache.
constexpr int64_t kColliding = 256;
// Multiply-adds for which threads are woken, and those that take as long as packing a number.
constexpr int64_t kWorthThreads = 1 << 18, kPacking = 8;

// What registers of Bytes hold: sums of kTall rows and two vectors of columns, two vectors of b, and a number of a.
template <int Bytes>
struct Shape {
  static constexpr int kLanes = Bytes / 4, kWide = 2 * kLanes, kTall = Bytes == 64 ? 14 : 6;
  typedef float V __attribute__((vector_size(Bytes)));
};

// What threads divide columns into: a multiple of every kWide.
constexpr int64_t kWidest = Shape<64>::kWide;

template <int... Lanes>
MLP_INLINE Float8 shuffled(Float8 a, Float8 b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Lanes...);
#else
  return __builtin_shuffle(a, b, Int8{Lanes...});
#endif
}

// to[j][i] = from[i][j] of 8 x 8.
MLP_INLINE void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  Float8 rows[8], pairs[8], fours[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) rows[i] = load<Float8>(from + i * from_stride);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = shuffled<0, 8, 1, 9, 4, 12, 5, 13>(rows[i], rows[i + 1]);
    pairs[i + 1] = shuffled<2, 10, 3, 11, 6, 14, 7, 15>(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    fours[i] = shuffled<0, 1, 8, 9, 4, 5, 12, 13>(pairs[i], pairs[i + 2]);
    fours[i + 1] = shuffled<2, 3, 10, 11, 6, 7, 14, 15>(pairs[i], pairs[i + 2]);
    fours[i + 2] = shuffled<0, 1, 8, 9, 4, 5, 12, 13>(pairs[i + 1], pairs[i + 3]);
    fours[i + 3] = shuffled<2, 3, 10, 11, 6, 7, 14, 15>(pairs[i + 1], pairs[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    store(to + i * to_stride, shuffled<0, 1, 2, 3, 8, 9, 10, 11>(fours[i], fours[i + 4]));
    store(to + (i + 4) * to_stride, shuffled<4, 5, 6, 7, 12, 13, 14, 15>(fours[i], fours[i + 4]));
  }
}

// to[j][i] = from[i][j], whose rows are contiguous.
MLP_INLINE void transpose(const float* from, int64_t rows, int64_t columns, int64_t from_stride, float* to,
                          int64_t to_stride) {
  int64_t i = 0;
  for (; i + 8 <= rows; i += 8) {
    int64_t j = 0;
    for (; j + 8 <= columns; j += 8) {
      transpose(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
    }
    for (; j < columns; ++j) {
      for (int64_t l = i; l < i + 8; ++l) to[j * to_stride + l] = from[l * from_stride + j];
    }
  }
  for (; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
}

// `to`, with contiguous rows, from a matrix with any strides.
MLP_INLINE void copy(const Matrix<float>& m, float* to, int64_t stride) {
  if (m.column_stride == 1) {
    for (int64_t i = 0; i < m.rows; ++i) std::copy_n(m.data + i * m.row_stride, m.columns, to + i * stride);
  } else if (m.row_stride == 1) {
    transpose(m.data, m.columns, m.rows, m.column_stride, to, stride);
  } else {
    for (int64_t i = 0; i < m.rows; ++i) {
      for (int64_t j = 0; j < m.columns; ++j) to[i * stride + j] = m.data[i * m.row_stride + j * m.column_stride];
    }
  }
}

// b in panels of Wide columns, one row behind the other. What the last one lacks stays what it was: those products are
// left out.
template <int Wide>
MLP_INLINE void pack(const Matrix<float>& b, float* to) {
  for (int64_t j = 0; j < b.columns; j += Wide, to += b.rows * Wide) {
    const int64_t count = std::min<int64_t>(Wide, b.columns - j);
    copy({b.data + j * b.column_stride, b.rows, count, b.row_stride, b.column_stride}, to, Wide);
  }
}

// Rows rows of out, `columns` of a panel's: the products of a's rows, `a_stride` apart, and a packed panel of b.
template <int Bytes, int Rows>
MLP_INLINE void tile(int64_t depth, const float* a, int64_t a_stride, const float* panel, float* out,
                     int64_t out_stride, int64_t columns, const float* bias, bool add) {
  using V = typename Shape<Bytes>::V;
  constexpr int kLanes = Shape<Bytes>::kLanes, kWide = Shape<Bytes>::kWide;
  V sums[Rows][2] = {};
  // Four rows from each of these are addresses that the processor computes. The compiler would keep one for each row,
  // in memory: there are not so many registers.
  const float* fours[4];
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) fours[q] = a + std::min(4 * q, Rows - 1) * a_stride;
  const int64_t thrice = 3 * a_stride;
  for (int64_t k = 0; k < depth; ++k, panel += kWide) {
    const V left = load<V>(panel), right = load<V>(panel + kLanes);
#pragma GCC unroll 4
    for (int q = 0; q < (Rows + 3) / 4; ++q) asm("" : "+r"(fours[q]));
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const float* four = fours[i / 4];
      const float factor = four[i % 4 == 3 ? thrice : i % 4 * a_stride];
      sums[i][0] += factor * left;
      sums[i][1] += factor * right;
    }
#pragma GCC unroll 4
    for (int q = 0; q < (Rows + 3) / 4; ++q) ++fours[q];
  }
  float whole[2 * kLanes] = {};
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    float* to = out + i * out_stride;
    const float* more = add ? to : bias;
    if (columns < kWide) {
      if (more != nullptr) std::copy_n(more, columns, whole);
      more = more == nullptr ? nullptr : whole;
    }
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      if (more != nullptr) sums[i][j] += load<V>(more + j * kLanes);
      store((columns < kWide ? whole : to) + j * kLanes, sums[i][j]);
    }
    if (columns < kWide) std::copy_n(whole, columns, to);
  }
}

// As `tile`, of a number of rows that is known now.
template <int Bytes, int Rows, class... Arguments>
MLP_INLINE void tile_of(int64_t rows, const Arguments&... arguments) {
  if constexpr (Rows > 0) {
    if (rows == Rows) return tile<Bytes, Rows>(arguments...);
    tile_of<Bytes, Rows - 1>(rows, arguments...);
  }
}

// Calls work(begin, count) for parts of [0, n) that are as even as they can be, and no larger than `most`.
template <class Work>
MLP_INLINE void evenly(int64_t n, int64_t most, const Work& work) {
  const int64_t parts = (n + most - 1) / most;
  for (int64_t i = 0; i < parts; ++i) work(i * n / parts, (i + 1) * n / parts - i * n / parts);
}

// out (+)= a b, of packed panels of b. `copied` is for rows of a that tiles cannot take as they are.
template <int Bytes>
MLP_INLINE void rows_of_tiles(const Matrix<float>& out, const Matrix<float>& a, const float* panels, const float* bias,
                              bool add, float* copied) {
  constexpr int kTall = Shape<Bytes>::kTall, kWide = Shape<Bytes>::kWide;
  const bool as_is = a.column_stride == 1 && a.row_stride % kColliding != 0;
  evenly(a.rows, kRows, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
    const Matrix<float> block = a.narrow(first, first + count);
    if (!as_is) copy(block, copied, kApart);
    const float* from = as_is ? block.data : copied;
    const int64_t stride = as_is ? a.row_stride : kApart;
    evenly(count, kTall, [&](int64_t i, int64_t rows) __attribute__((always_inline)) {
      float* to = out.data + (first + i) * out.row_stride;
      for (int64_t j = 0; j < out.columns; j += kWide) {
        const int64_t columns = std::min<int64_t>(kWide, out.columns - j);
        tile_of<Bytes, kTall>(rows, a.columns, from + i * stride, stride, panels + j * a.columns, to + j,
                              out.row_stride, columns, bias == nullptr ? bias : bias + j, add);
      }
    });
  });
}

// Memory of one thread, kept: to get as much from the system takes as long as a small product. It is zero at first, as
// what comes from the system may be numbers that take long to multiply.
float* scratch() {
  constexpr int64_t kAligned = 16;
  thread_local std::vector<float> own(kDepth * kColumns + kRows * kApart + kAligned);
  const auto place = reinterpret_cast<uintptr_t>(own.data()) / sizeof(float);
  return own.data() + (kAligned - place % kAligned) % kAligned;
}

template <int Bytes>
MLP_INLINE void part_body(const Matrix<float>& out, const Matrix<float>& a, const Matrix<float>& b, const float* bias,
                          bool add, float* panels) {
  static_assert(kColumns % Shape<Bytes>::kWide == 0);
  for (int64_t j = 0; j < out.columns; j += kColumns) {
    const int64_t columns = std::min(kColumns, out.columns - j);
    const Matrix<float> to{out.data + j, out.rows, columns, out.row_stride, 1};
    for (int64_t k = 0; k < a.columns; k += kDepth) {
      const int64_t depth = std::min(kDepth, a.columns - k);
      const float* from = b.data + k * b.row_stride + j * b.column_stride;
      pack<Shape<Bytes>::kWide>({const_cast<float*>(from), depth, columns, b.row_stride, b.column_stride}, panels);
      rows_of_tiles<Bytes>(to, {a.data + k * a.column_stride, a.rows, depth, a.row_stride, a.column_stride}, panels,
                           bias == nullptr ? bias : bias + j, add || k > 0, panels + kDepth * kColumns);
    }
  }
}

#define MLP_PART(Target, Bytes, Name)                                                                               \
  Target static void Name(const Matrix<float>& out, const Matrix<float>& a, const Matrix<float>& b,                 \
                          const float* bias, bool add, float* panels) {                                             \
    part_body<Bytes>(out, a, b, bias, add, panels);                                                                 \
  }
MLP_EACH_TARGET(MLP_PART, part)
#undef MLP_PART

// Bytes of the registers for which the loader takes the code.
#define MLP_BYTES(Target, Bytes, Name) \
  Target static int Name() { return Bytes; }
MLP_EACH_TARGET(MLP_BYTES, bytes)
#undef MLP_BYTES

bool is_intel() {
#if defined(MLP_AVX2)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace

bool has_gemm() {
  static const bool has = [] {
    const char* asked = std::getenv("FUSION_KERNELS_CPU_PRODUCTS");
    const std::string_view name = asked == nullptr || *asked == '\0' ? "auto" : asked;
    STD_TORCH_CHECK(name == "auto" || name == "own" || name == "blas",
                    "FUSION_KERNELS_CPU_PRODUCTS is ", name, ": use auto, own or blas");
    if (name != "auto") return name == "own";
    return !is_intel() && bytes() > 16;
  }();
  return has;
}

void gemm(const Matrix<float>& out, const Matrix<float>& a, const Matrix<float>& b, const float* bias, bool add) {
  if (out.rows == 0 || out.columns == 0) return;
  if (a.columns == 0 && !add) {
    for (int64_t i = 0; i < out.rows; ++i) {
      float* to = out.data + i * out.row_stride;
      bias == nullptr ? std::fill_n(to, out.columns, 0.0f) : std::copy_n(bias, out.columns, to);
    }
  }
  const int64_t threads = out.rows * out.columns * a.columns > kWorthThreads ? torch::stable::get_num_threads() : 1;
  const int64_t widest = (out.columns + kWidest - 1) / kWidest, highest = (out.rows + kRows - 1) / kRows;
  int64_t high = 1, wide = 1;
  double least = std::numeric_limits<double>::infinity();
  for (int64_t columns = 1; columns <= std::min(threads, widest); ++columns) {
    const int64_t rows = std::min(threads / columns, highest);
    const double tall = (out.rows + rows - 1) / rows, broad = (widest + columns - 1) / columns * kWidest;
    // Of the largest part: multiplying, and packing what is multiplied.
    const double cost = tall * broad + kPacking * (tall + broad);
    if (cost < least) least = cost, high = rows, wide = columns;
  }
  for_each_if(high * wide > 1, high * wide, [&](int64_t item) {
    const int64_t top = item / wide * out.rows / high, bottom = (item / wide + 1) * out.rows / high;
    const int64_t left = item % wide * widest / wide * kWidest;
    const int64_t right = std::min((item % wide + 1) * widest / wide * kWidest, out.columns);
    part({out.data + top * out.row_stride + left, bottom - top, right - left, out.row_stride, 1}, a.narrow(top, bottom),
         {b.data + left * b.column_stride, b.rows, right - left, b.row_stride, b.column_stride},
         bias == nullptr ? bias : bias + left, add, scratch());
  });
}

}  // namespace mlp_fusion
