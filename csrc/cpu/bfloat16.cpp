#include "bfloat16.h"

#include <algorithm>
#include <cstring>

#include "simd.h"

// The instruction has no vector extension of the compiler's: it needs its intrinsics, and a build that may use them.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    (!defined(MLP_PINNED_BYTES) || MLP_PINNED_BYTES == 64)
#define MLP_BFLOAT16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
// GCC 12's own intrinsics start from registers that they leave as they are.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace mlp_fusion {
namespace {

// A tile has the sums of kRows points with kVectors * kPackedPoints others in registers.
constexpr int64_t kRows = 8, kVectors = 3, kColumns = kVectors * kPackedPoints;
// Pairs that are summed before their sums go to memory: what a tile's columns have of them stays in the second cache,
// and no sum in float32 grows long.
constexpr int64_t kDepth = 64;

static_assert(kPackedPoints % kRows == 0 && kPanelRows % kColumns == 0);

constexpr int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The bits of two numbers in bfloat16; `lost` gathers what it does not hold of them.
MLP_INLINE uint32_t pair_of(const float* x, uint32_t& lost) {
  uint32_t first, second;
  std::memcpy(&first, x, sizeof(first));
  std::memcpy(&second, x + 1, sizeof(second));
  lost |= first | second;
  return first >> 16 | (second & 0xffff0000u);
}

MLP_INLINE uint32_t pair_of(const uint16_t* x, uint32_t&) {
  uint32_t pair;
  std::memcpy(&pair, x, sizeof(pair));
  return pair;
}

// Pairs [first, last) of `count` points, in any number of either.
template <class T>
void pack_some(const T* x, int64_t count, int64_t d, int64_t first, int64_t last, uint32_t* out, uint32_t& lost) {
  for (int64_t p = first; p < last; ++p) {
    for (int64_t i = 0; i < kPackedPoints; ++i) {
      const T pair[2] = {i < count ? x[i * d + 2 * p] : T{0}, i < count && 2 * p + 1 < d ? x[i * d + 2 * p + 1] : T{0}};
      out[p * kPackedPoints + i] = pair_of(pair, lost);
    }
  }
}

#if defined(MLP_BFLOAT16)

// As pair_of, of kPackedPoints pairs.
MLP_BFLOAT16 MLP_INLINE __m512i pairs_of(const float* x, __m512i& lost) {
  const __m512i first = _mm512_loadu_si512(x), second = _mm512_loadu_si512(x + kPackedPoints);
  lost = _mm512_or_si512(lost, _mm512_or_si512(first, second));
  // The upper half of every number: the odd ones of 64.
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i odd = _mm512_add_epi32(_mm512_mullo_epi32(lanes, _mm512_set1_epi32(0x00040004)),
                                       _mm512_set1_epi32(0x00030001));
  return _mm512_permutex2var_epi16(first, odd, second);
}

MLP_BFLOAT16 MLP_INLINE __m512i pairs_of(const uint16_t* x, __m512i&) { return _mm512_loadu_si512(x); }

// Whole vectors of pairs of kPackedPoints points, from pair 0 on; returns how many. A square of pairs at a time is read
// by its rows and written by its columns.
template <class T>
MLP_BFLOAT16 int64_t pack_squares(const T* x, int64_t d, uint32_t* out, uint32_t& lost) {
  constexpr int64_t n = kPackedPoints;
  __m512i all = _mm512_setzero_si512();
  int64_t p = 0;
  for (; 2 * (p + n) <= d; p += n) {
    __m512i a[n], b[n];
#pragma GCC unroll 16
    for (int64_t i = 0; i < n; ++i) a[i] = pairs_of(x + i * d + 2 * p, all);
#pragma GCC unroll 16
    for (int64_t i = 0; i < n; i += 2) {
      b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < n; i += 4) {
      a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
      a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
      a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
      a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    // a[4 q + r] holds, in its lane l, pair 4 l + r of points 4 q to 4 q + 3.
#pragma GCC unroll 4
    for (int64_t r = 0; r < 4; ++r) {
      const __m512i even = _mm512_shuffle_i32x4(a[r], a[4 + r], 0x88), odd = _mm512_shuffle_i32x4(a[r], a[4 + r], 0xdd);
      const __m512i more = _mm512_shuffle_i32x4(a[8 + r], a[12 + r], 0x88);
      const __m512i rest = _mm512_shuffle_i32x4(a[8 + r], a[12 + r], 0xdd);
      uint32_t* to = out + (p + r) * n;
      _mm512_storeu_si512(to, _mm512_shuffle_i32x4(even, more, 0x88));
      _mm512_storeu_si512(to + 4 * n, _mm512_shuffle_i32x4(odd, rest, 0x88));
      _mm512_storeu_si512(to + 8 * n, _mm512_shuffle_i32x4(even, more, 0xdd));
      _mm512_storeu_si512(to + 12 * n, _mm512_shuffle_i32x4(odd, rest, 0xdd));
    }
  }
  lost |= _mm512_reduce_or_epi32(all);
  return p;
}

#endif

template <class T>
bool pack(const T* x, int64_t count, int64_t d, uint32_t* out) {
  uint32_t lost = 0;
  int64_t done = 0;
#if defined(MLP_BFLOAT16)
  if (count == kPackedPoints) done = pack_squares(x, d, out, lost);
#endif
  pack_some(x, count, d, done, packed_pairs(d), out, lost);
  return (lost & 0xffff) == 0;
}

#if defined(MLP_BFLOAT16)

// g (kRows, kColumns) += factor times the products of kRows packed points with kColumns others, `apart` pairs from one
// packed group to the next; rows and vectors beyond those that g has are not written.
MLP_BFLOAT16 void tile(const uint32_t* rows, const uint32_t* columns, int64_t apart, int64_t pairs, float factor,
                       float* g, int64_t stride, int64_t row_count, int64_t vector_count) {
  __m512 sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int64_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int64_t j = 0; j < kVectors; ++j) sum[i][j] = _mm512_setzero_ps();
  }
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh vectors[kVectors];
#pragma GCC unroll 8
    for (int64_t j = 0; j < kVectors; ++j) {
      vectors[j] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(columns + (j * apart + p) * kPackedPoints));
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < kRows; ++i) {
      const __m512bh row = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(rows[p * kPackedPoints + i])));
#pragma GCC unroll 8
      for (int64_t j = 0; j < kVectors; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], row, vectors[j]);
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int64_t j = 0; j < kVectors; ++j) {
      if (i >= row_count || j >= vector_count) continue;
      float* to = g + i * stride + j * kPackedPoints;
      _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_set1_ps(factor), sum[i][j], _mm512_loadu_ps(to)));
    }
  }
}

#endif

}  // namespace

bool has_bfloat16_products() {
#if defined(MLP_BFLOAT16)
  static const bool has = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl");
  return has;
#else
  return false;
#endif
}

int64_t packed_pairs(int64_t d) { return (d + 1) / 2; }
int64_t packed_points(int64_t n) { return rounded_up(n, kColumns); }

bool pack_bfloat16(const float* x, int64_t count, int64_t d, uint32_t* out) { return pack(x, count, d, out); }
bool pack_bfloat16(const uint16_t* x, int64_t count, int64_t d, uint32_t* out) { return pack(x, count, d, out); }

void add_bfloat16_products(const uint32_t* x, int64_t d, int64_t begin, int64_t end, int64_t n, float factor, float* g,
                           int64_t stride) {
#if defined(MLP_BFLOAT16)
  const int64_t all = packed_pairs(d), vectors = rounded_up(n, kPackedPoints) / kPackedPoints;
  for (int64_t first = 0; first < all; first += kDepth) {
    const int64_t pairs = std::min(kDepth, all - first);
    const auto at = [&](int64_t point) {
      return x + (point / kPackedPoints * all + first) * kPackedPoints + point % kPackedPoints;
    };
    for (int64_t j = 0; j < end; j += kColumns) {
      // From the first tile that reaches the diagonal.
      for (int64_t i = std::max(begin, j / kRows * kRows); i < end; i += kRows) {
        tile(at(i), at(j), all, pairs, factor, g + i * stride + j, stride, std::min(kRows, end - i),
             vectors - j / kPackedPoints);
      }
    }
  }
#else
  static_cast<void>(x), static_cast<void>(d), static_cast<void>(begin), static_cast<void>(end);
  static_cast<void>(n), static_cast<void>(factor), static_cast<void>(g), static_cast<void>(stride);
#endif
}

}  // namespace mlp_fusion
