// How a tile's results go to K.
#pragma once

#include "ntk.h"

namespace mlp_fusion::cuda {

// Write one value of K to where it belongs, and in a symmetric K to its mirror image. Values above the diagonal are left
// to the mirror, which makes the two triangles equal to the bit. Streamed: K is not read again, the operands are.
template <class T>
__device__ __forceinline__ void store(const Gram<T>& gram, int64_t row, int64_t column, T value) {
  if (row >= gram.n1 || column >= gram.n2 || (gram.symmetric && column > row)) return;
  T* const at = gram.out + row * gram.stride + column;
  value += gram.constant;
  if (gram.accumulate) value += *at;
  __stcs(at, value);
  if (gram.symmetric && column < row) __stcs(gram.out + column * gram.stride + row, value);
}

// A grid of one block per tile of the given edge; 0 if there is nothing to do, -1 if they are too many for one launch.
template <class T>
int64_t grid_of(const Gram<T>& gram, int64_t edge) {
  const int64_t rows = (gram.n1 + edge - 1) / edge, columns = (gram.n2 + edge - 1) / edge;
  const int64_t tiles = tile_count(rows, columns, gram.symmetric);
  return tiles <= 0x7fffffff ? tiles : -1;
}

template <class T>
__device__ __forceinline__ Tile tile_of_block(const Gram<T>& gram, int64_t edge) {
  const int64_t rows = (gram.n1 + edge - 1) / edge, columns = (gram.n2 + edge - 1) / edge;
  return tile_at(blockIdx.x, rows, columns, gram.symmetric);
}

}  // namespace mlp_fusion::cuda
