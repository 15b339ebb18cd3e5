// Tiles of K in the arithmetic of float or double: products by multiply-add, a slice of both operands in shared memory
// while the next is on its way in registers.
#include "ntk.h"

namespace mlp_fusion::cuda {
namespace {

using namespace plain_cores;

// 16 bytes.
template <class T>
struct alignas(16) Group {
  T value[Shape<T>::kGroup];
};

template <class T>
__device__ __forceinline__ Group<T> group(const T* from) {
  return *reinterpret_cast<const Group<T>*>(from);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) gram_kernel(const Gram<T> gram) {
  using S = Shape<T>;
  using Accumulator = T[S::kOwn][S::kOwn];
  __shared__ __align__(16) T shared[2][2][kSlice][S::kPitch];  // buffer, side, column of the slice, row
  const int thread = threadIdx.x, across = thread % 16, down = thread / 16;
  const Tile tile = tile_of(gram, S::kEdge, blockIdx.x);
  const int64_t row = tile.row * S::kEdge, column = tile.column * S::kEdge, width = gram.columns.all();
  const int64_t slices = width / kSlice;

  Group<T> ahead[2][S::kCopies];
  const auto fetch = [&](int64_t slice) {
    MLP_UNROLL for (int copy = 0; copy < S::kCopies; ++copy) {
      // Rows beyond the last are read as the last, and not stored.
      const tensor_cores::Piece at = copied<T>(thread, copy);
      const int64_t begin = slice * kSlice + at.piece * S::kGroup;
      const int64_t i = least(row + at.row, gram.n1 - 1), j = least(column + at.row, gram.n2 - 1);
      ahead[0][copy] = group(static_cast<const T*>(gram.left) + i * width + begin);
      ahead[1][copy] = group(static_cast<const T*>(gram.right) + j * width + begin);
    }
  };
  const auto settle = [&](int buffer) {
    MLP_UNROLL for (int side = 0; side < 2; ++side) {
      MLP_UNROLL for (int copy = 0; copy < S::kCopies; ++copy) {
        const tensor_cores::Piece at = copied<T>(thread, copy);
        MLP_UNROLL for (int k = 0; k < S::kGroup; ++k) {
          shared[buffer][side][at.piece * S::kGroup + k][at.row] = ahead[side][copy].value[k];
        }
      }
    }
  };
  const auto advance = [&](int64_t slice, Accumulator& sum) {
    const int buffer = slice % 2;
    settle(buffer);
    // One barrier per slice: who writes a buffer again has passed the barrier behind its last reads.
    __syncthreads();
    if (slice + 1 < slices) fetch(slice + 1);
    // A slice is summed by itself, and its sum added: the error grows with the number of slices, not of columns. Half of
    // the rows at a time, for want of registers.
    MLP_UNROLL for (int half = 0; half < S::kOwn; half += S::kGroup) {
      T part[S::kGroup][S::kOwn] = {};
#pragma unroll 4
      for (int k = 0; k < kSlice; ++k) {
        const Group<T> a = group(shared[buffer][0][k] + own<T>(down, half));
        Group<T> b[2];
        MLP_UNROLL for (int g = 0; g < 2; ++g) b[g] = group(shared[buffer][1][k] + own<T>(across, g * S::kGroup));
        MLP_UNROLL for (int i = 0; i < S::kGroup; ++i) {
          MLP_UNROLL for (int j = 0; j < S::kOwn; ++j) {
            part[i][j] += a.value[i] * b[j / S::kGroup].value[j % S::kGroup];
          }
        }
      }
      MLP_UNROLL for (int i = 0; i < S::kGroup; ++i) {
        MLP_UNROLL for (int j = 0; j < S::kOwn; ++j) sum[half + i][j] += part[i][j];
      }
    }
  };

  if (slices > 0) fetch(0);
  Accumulator inputs = {}, total = {};
  const int64_t behind_inputs = gram.columns.inputs / kSlice;
  const int64_t behind_slopes = behind_inputs + gram.columns.slopes() / kSlice;
  int64_t slice = 0;
  for (; slice < behind_inputs; ++slice) advance(slice, inputs);
  for (; slice < behind_slopes; ++slice) advance(slice, total);
  MLP_UNROLL for (int i = 0; i < S::kOwn; ++i) {
    MLP_UNROLL for (int j = 0; j < S::kOwn; ++j) total[i][j] *= inputs[i][j] + gram.bias;
  }
  for (; slice < slices; ++slice) advance(slice, total);

  const bool inner = is_inner(gram, tile, S::kEdge);
  MLP_UNROLL for (int i = 0; i < S::kOwn; ++i) {
    MLP_UNROLL for (int j = 0; j < S::kOwn; ++j) {
      store(gram, inner, row + own<T>(down, i), column + own<T>(across, j), total[i][j]);
    }
  }
}

}  // namespace

template <class T>
cudaError_t gram_plain(const Gram<T>& gram, cudaStream_t stream) {
  const int64_t grid = tiles_of(gram, Shape<T>::kEdge);
  if (grid == 0) return cudaSuccess;
  if (grid > kMostBlocks) return cudaErrorInvalidConfiguration;
  gram_kernel<T><<<static_cast<unsigned>(grid), kThreads, 0, stream>>>(gram);
  return cudaGetLastError();
}

template cudaError_t gram_plain(const Gram<float>&, cudaStream_t);
template cudaError_t gram_plain(const Gram<double>&, cudaStream_t);

}  // namespace mlp_fusion::cuda
