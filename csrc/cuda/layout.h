// Where everything lies in the tile kernels: index arithmetic alone, shared with the host, so that the tests can run it
// on machines without a GPU.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define MLP_HD __host__ __device__ __forceinline__
#define MLP_UNROLL _Pragma("unroll")
#else
#define MLP_HD inline
#define MLP_UNROLL
#endif

namespace mlp_fusion::cuda {

// Columns of one step of the products. The ranges of an operand's columns are padded to multiples of it with zeros, so
// that no step has an edge and rows begin at multiples of 16 bytes.
constexpr int kDepth = 32;

MLP_HD int64_t padded_columns(int64_t columns) { return (columns + kDepth - 1) / kDepth * kDepth; }

MLP_HD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct Tile {
  int64_t row, column;
};

// Rows of tiles that are walked together, column by column: the blocks that run at one time then share both operands in
// the second-level cache.
constexpr int64_t kBand = 8;

MLP_HD int64_t triangle(int64_t n) { return n * (n + 1) / 2; }

// The place of `index` among the tiles on and below the diagonal, row by row.
MLP_HD Tile triangle_tile(int64_t index) {
  int64_t row = static_cast<int64_t>((std::sqrt(8.0 * static_cast<double>(index) + 1.0) - 1.0) / 2.0);
  if (triangle(row) > index) --row;  // the root may be off by its rounding
  if (triangle(row + 1) <= index) ++row;
  return {row, index - triangle(row)};
}

MLP_HD int64_t tile_count(int64_t rows, int64_t columns, bool symmetric) {
  return symmetric ? triangle(rows) : rows * columns;
}

// The tile number `index` of rows x columns tiles; of a symmetric result, of those on and below the diagonal.
MLP_HD Tile tile_at(int64_t index, int64_t rows, int64_t columns, bool symmetric) {
  if (!symmetric) {
    const int64_t band = index / (kBand * columns) * kBand, height = least(kBand, rows - band);
    const int64_t within = index - band * columns;
    return {band + within % height, within / height};
  }
  const int64_t band = triangle_tile(index).row / kBand * kBand, height = least(kBand, rows - band);
  const int64_t within = index - triangle(band);
  if (within < band * height) return {band + within % height, within / height};
  const Tile corner = triangle_tile(within - band * height);
  return {band + corner.row, band + corner.column};
}

// The tensor cores' tile: 8 warps, 2 x 4, of 64 x 32 results each, 4 x 4 products of mma.m16n8k16 on bfloat16 or
// mma.m16n8k8 on TF32. Both take the same bytes in the same registers, and all that follows counts elements of 16 bits: a
// bfloat16 is one of them, a TF32 two. A stage of shared memory holds, for each plane of each side, 128 rows of kDepth
// elements: 4 pieces of 16 bytes, exchanged among themselves so that the 8 rows that ldmatrix reads at a time, and the 8
// pieces that neighbouring threads write, lie in different banks.
namespace tensor_cores {

constexpr int kEdge = 128, kThreads = 256, kWarpsAcross = 4, kWarpRows = 64, kWarpColumns = 32;
constexpr int kDown = kWarpRows / 16, kAcross = kWarpColumns / 8;
constexpr int kPiece = 8;                          // elements of 16 bytes
constexpr int kPieces = kDepth / kPiece;           // of a row
constexpr int kPlane = kEdge * kDepth;             // elements of one plane of one side
constexpr int kCopies = kEdge * kPieces / kThreads;  // pieces that a thread copies of each plane

MLP_HD constexpr int stages(int planes) { return planes == 1 ? 4 : 3; }
MLP_HD constexpr int stage_elements(int planes) { return 2 * planes * kPlane; }
MLP_HD constexpr int shared_bytes(int planes) { return stages(planes) * stage_elements(planes) * 2; }

struct Piece {
  int row, piece;
};

// The element of a stage at which a plane of a side (0: left, 1: right) begins.
MLP_HD int plane_offset(int planes, int side, int plane) { return (side * planes + plane) * kPlane; }

// The element of a plane at which a piece of a row begins.
MLP_HD int shared_offset(Piece at) { return at.row * kDepth + ((at.piece ^ ((at.row >> 1) & 3)) * kPiece); }

// What a thread copies, copy = 0 ... kCopies - 1.
MLP_HD Piece copied(int thread, int copy) {
  const int index = copy * kThreads + thread;
  return {index / kPieces, index % kPieces};
}

MLP_HD int warp_row(int warp) { return warp / kWarpsAcross * kWarpRows; }
MLP_HD int warp_column(int warp) { return warp % kWarpsAcross * kWarpColumns; }

// What a lane points ldmatrix.x4 to: for the 16 x 16 of the left side that begins at `row`, registers 0 ... 3 of mma's A;
// for the 16 x 16 of the right side, registers 0, 1 of B of the first 8 rows, then of the second.
MLP_HD Piece left_fragment(int lane, int row) { return {row + lane % 16, lane / 16}; }
MLP_HD Piece right_fragment(int lane, int row) { return {row + lane % 8 + lane / 16 * 8, lane / 8 % 2}; }

// shared_offset of the fragment `rows` further down, a multiple of 8, in elements 16 * step and on, from that of the
// fragment given above. step = 0, 1.
MLP_HD int fragment_offset(int first, int rows, int step) { return (first ^ (step * 2 * kPiece)) + rows * kDepth; }

// The place in the tile of element `e` (0 ... 3) of a lane's accumulator of product (down, across).
MLP_HD Tile result(int warp, int lane, int down, int across, int e) {
  return {warp_row(warp) + 16 * down + 8 * (e / 2) + lane / 4, warp_column(warp) + 8 * across + lane % 4 * 2 + e % 2};
}

// The products of planes that are summed, smallest first. The product of both remainders is about the rounding of the
// planes or below it.
MLP_HD constexpr int passes(int planes) { return planes == 1 ? 1 : 3; }
MLP_HD int left_plane(int planes, int pass) { return planes == 2 && pass == 0 ? 1 : 0; }
MLP_HD int right_plane(int planes, int pass) { return planes == 2 && pass == 1 ? 1 : 0; }

// Add the product of one stage, of this warp's rows and columns, to `sum`. With two planes the tensor cores, which truncate
// as they add, sum 16 elements of a row only; those sums are added by additions that round. A Warp loads fragments (16 x 16
// elements of a plane, `rows` below its first) and multiplies the left one with the first or second 8 rows of the right one.
template <int kPlanes, class Warp>
MLP_HD void multiply_stage(const Warp& warp, typename Warp::Sum (&sum)[kDown][kAcross]) {
  using Fragment = typename Warp::Fragment;
#if defined(__CUDACC__)
  // Unrolled, two planes take more registers than there are.
#pragma unroll(kPlanes == 1 ? kDepth / 16 : 1)
#endif
  for (int step = 0; step < kDepth / 16; ++step) {
    Fragment right[kPlanes][kAcross / 2];
    MLP_UNROLL for (int plane = 0; plane < kPlanes; ++plane) {
      MLP_UNROLL for (int pair = 0; pair < kAcross / 2; ++pair) {
        right[plane][pair] = warp.right(plane, 16 * pair, step);
      }
    }
    MLP_UNROLL for (int down = 0; down < kDown; ++down) {
      Fragment left[kPlanes];
      MLP_UNROLL for (int plane = 0; plane < kPlanes; ++plane) left[plane] = warp.left(plane, 16 * down, step);
      MLP_UNROLL for (int across = 0; across < kAcross; ++across) {
        if (kPlanes == 1) {
          warp.multiply_add(sum[down][across], left[0], right[0][across / 2], across % 2);
        } else {
          typename Warp::Sum part = {};
          MLP_UNROLL for (int pass = 0; pass < passes(kPlanes); ++pass) {
            const Fragment& of_right = right[right_plane(kPlanes, pass)][across / 2];
            warp.multiply_add(part, left[left_plane(kPlanes, pass)], of_right, across % 2);
          }
          warp.add(sum[down][across], part);
        }
      }
    }
  }
}

}  // namespace tensor_cores

// The tile without tensor cores: 16 x 16 threads. A thread has two groups of neighbouring rows and two of columns, 16 bytes
// each, half a tile apart, so that a warp reads neighbouring words of shared memory, which holds kSlice columns of both
// sides, transposed.
namespace plain_cores {

constexpr int kThreads = 256, kSlice = 16;

template <class T>
struct Shape {
  static constexpr int kGroup = 16 / sizeof(T);
  static constexpr int kEdge = 32 * kGroup;
  static constexpr int kOwn = 2 * kGroup;                         // rows and columns of a thread
  static constexpr int kPieces = kSlice / kGroup;                 // of 16 bytes, of a row
  static constexpr int kCopies = kEdge * kPieces / kThreads;      // pieces that a thread copies of each side
  static constexpr int kPitch = kEdge + kGroup;
};

// Row or column number `i` of thread 0 ... 15.
template <class T>
MLP_HD int own(int thread, int i) {
  constexpr int group = Shape<T>::kGroup;
  return i / group * (Shape<T>::kEdge / 2) + thread * group + i % group;
}

template <class T>
MLP_HD tensor_cores::Piece copied(int thread, int copy) {
  const int index = copy * kThreads + thread;
  return {index / Shape<T>::kPieces, index % Shape<T>::kPieces};
}

}  // namespace plain_cores

}  // namespace mlp_fusion::cuda
