// What the tile kernels compute,
//
//   K = constant + H1 H2ᵀ + (X1 X2ᵀ + bias) ∘ (S1 S2ᵀ)
//
// of two operands (operand.h), each the columns X | S | H of its rows. One block of threads computes one tile of K with
// two accumulators: X1 X2ᵀ in the first, S1 S2ᵀ in the second, which is then multiplied by the first and goes on to
// H1 H2ᵀ. Nothing of the size of K is stored but K. Each value of K has one summation order, which depends on the number
// of columns alone.
#pragma once

#include "operand.h"

namespace mlp_fusion::cuda {

// Values of T are stored as they are (one plane, stored as T); as bfloat16, rounded (one plane), or rounded and what
// rounding left, rounded again (two planes, 16 significant bits); or so as TF32 (two planes, 22 significant bits, stored as
// float).
enum class Format { plain, bfloat16, bfloat16_twice, tf32_twice };

MLP_HD int planes(Format format) { return format == Format::plain || format == Format::bfloat16 ? 1 : 2; }

template <class T>
struct Gram {
  const void *left, *right;  // (planes, n1 or n2, columns.all())
  int64_t left_plane, right_plane;  // values between their planes: they may be some rows of larger operands
  int64_t n1, n2;
  Columns columns;
  T bias, constant;
  bool accumulate;  // add to what `out` holds
  bool symmetric;   // left and right are the same: half of the tiles are computed, and mirrored bit by bit
  T* out;
  int64_t stride;  // of the rows of out
};

template <class T>
MLP_HD int64_t tiles_of(const Gram<T>& gram, int64_t edge) {
  return tile_count((gram.n1 + edge - 1) / edge, (gram.n2 + edge - 1) / edge, gram.symmetric);
}

template <class T>
MLP_HD Tile tile_of(const Gram<T>& gram, int64_t edge, int64_t index) {
  return tile_at(index, (gram.n1 + edge - 1) / edge, (gram.n2 + edge - 1) / edge, gram.symmetric);
}

// Streamed on a GPU: K is not read again, the operands are.
template <class T>
MLP_HD void stream(T* to, T value) {
#if defined(__CUDA_ARCH__)
  __stcs(to, value);
#else
  *to = value;
#endif
}

// Whether every value of a tile exists and, in a symmetric K, lies below the diagonal.
template <class T>
MLP_HD bool is_inner(const Gram<T>& gram, Tile tile, int64_t edge) {
  return (tile.row + 1) * edge <= gram.n1 && (tile.column + 1) * edge <= gram.n2 &&
         !(gram.symmetric && tile.row == tile.column);
}

// Write one value of K to where it belongs, and in a symmetric K to its mirror image. Values above the diagonal are left
// to the mirror, which makes the two triangles equal to the bit. `inner`: of a tile of which nothing is left out.
template <class T>
MLP_HD void store(const Gram<T>& gram, bool inner, int64_t row, int64_t column, T value) {
  if (!inner && (row >= gram.n1 || column >= gram.n2 || (gram.symmetric && column > row))) return;
  T* const at = gram.out + row * gram.stride + column;
  value += gram.constant;
  if (gram.accumulate) value += *at;
  stream(at, value);
  if (gram.symmetric && (inner || column < row)) stream(gram.out + column * gram.stride + row, value);
}

}  // namespace mlp_fusion::cuda
