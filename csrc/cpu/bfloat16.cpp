#include "bfloat16.h"

#include <algorithm>
#include <cstring>

#include "simd.h"

// The instruction has no vector extension of the compiler's: it needs its intrinsics, and a build that may use them.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    (!defined(MLP_PINNED_BYTES) || MLP_PINNED_BYTES == 64)
#define MLP_BFLOAT16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#include <immintrin.h>
#endif

namespace mlp_fusion {
namespace {

// A tile has kRows x kColumns sums in registers; a point is a multiple of kStep numbers.
constexpr int64_t kRows = 6, kColumns = 4, kStep = 32;
// Numbers of a point, and points, that are multiplied before the next ones: together they stay in the second cache.
constexpr int64_t kDepth = 2048, kBlock = 120;

constexpr int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

MLP_INLINE bool pack_body(const float* x, int64_t d, uint16_t* out) {
  uint32_t lost = 0;
  for (int64_t i = 0; i < d; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    lost |= bits;
    out[i] = static_cast<uint16_t>(bits >> 16);
  }
  return (lost & 0xffff) == 0;
}

MLP_CLONES bool pack(const float* x, int64_t d, uint16_t* out) { return pack_body(x, d, out); }

#if defined(MLP_BFLOAT16)

MLP_BFLOAT16 MLP_INLINE float sum_of(__m512 v) {
  float lanes[16];
  _mm512_storeu_ps(lanes, v);
  const Float8 eight = load<Float8>(lanes) + load<Float8>(lanes + 8);
  store(lanes, eight);
  const Float4 four = load<Float4>(lanes) + load<Float4>(lanes + 4);
  return (four[0] + four[1]) + (four[2] + four[3]);
}

// sums (kRows, kColumns) of products of the rows of a and b, `stride` apart, over `depth` numbers.
MLP_BFLOAT16 void tile(const uint16_t* a, const uint16_t* b, int64_t stride, int64_t depth, float* sums) {
  __m512 sum[kRows][kColumns];
#pragma GCC unroll 8
  for (int64_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int64_t j = 0; j < kColumns; ++j) sum[i][j] = _mm512_setzero_ps();
  }
  for (int64_t d = 0; d < depth; d += kStep) {
    __m512bh columns[kColumns];
#pragma GCC unroll 8
    for (int64_t j = 0; j < kColumns; ++j) {
      columns[j] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + j * stride + d));
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < kRows; ++i) {
      const __m512bh row = reinterpret_cast<__m512bh>(_mm512_loadu_si512(a + i * stride + d));
#pragma GCC unroll 8
      for (int64_t j = 0; j < kColumns; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], row, columns[j]);
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int64_t j = 0; j < kColumns; ++j) sums[i * kColumns + j] = sum_of(sum[i][j]);
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

int64_t packed_rows(int64_t n) { return rounded_up(n, kRows * kColumns); }
int64_t packed_columns(int64_t d) {
  const int64_t columns = rounded_up(d, kStep);
  // Rows that are a multiple of the page size apart compete for the same few lines of the cache.
  return columns % 2048 == 0 ? columns + kStep : columns;
}

bool pack_bfloat16(const float* x, int64_t d, uint16_t* out) {
  std::fill(out + d, out + packed_columns(d), uint16_t{0});
  return pack(x, d, out);
}

void gram_rows_bfloat16(const uint16_t* x, int64_t d, int64_t begin, int64_t end, int64_t n, float* g,
                        int64_t stride) {
#if defined(MLP_BFLOAT16)
  const int64_t columns = packed_columns(d);
  float sums[kRows * kColumns];
  for (int64_t first = 0; first < d; first += kDepth) {
    const int64_t depth = rounded_up(std::min(kDepth, d - first), kStep);
    for (int64_t block = 0; block < end; block += kBlock) {
      for (int64_t i = begin; i < end; i += kRows) {
        for (int64_t j = block; j < std::min(block + kBlock, std::min(i + kRows, n)); j += kColumns) {
          tile(x + i * columns + first, x + j * columns + first, columns, depth, sums);
          for (int64_t r = i; r < std::min(i + kRows, n); ++r) {
            for (int64_t c = j; c < std::min(j + kColumns, n); ++c) {
              float& entry = g[r * stride + c];
              const float sum = sums[(r - i) * kColumns + c - j];
              entry = first == 0 ? sum : entry + sum;
            }
          }
        }
      }
    }
  }
#else
  static_cast<void>(x), static_cast<void>(d), static_cast<void>(begin), static_cast<void>(end);
  static_cast<void>(n), static_cast<void>(g), static_cast<void>(stride);
#endif
}

}  // namespace mlp_fusion
