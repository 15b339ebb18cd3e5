// Tiles of K on tensor cores: mma.sync on bfloat16, operands through a ring of stages in shared memory.
#include "store.cuh"

namespace mlp_fusion::cuda {
namespace {

using namespace tensor_cores;

__device__ __forceinline__ void copy_async(uint32_t to, const uint16_t* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;"); }

template <int pending>
__device__ __forceinline__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

using Accumulator = float[kDown][kAcross][4];

// Add the product of one stage to the accumulator. With two planes the tensor cores, which truncate as they add, sum 16
// columns only; those sums are added to the accumulator by additions that round.
template <int kPlanes>
__device__ __forceinline__ void multiply_stage(uint32_t stage, int left_first, int right_first, Accumulator& sum) {
  constexpr int side = kPlanes * kPlane;
  const auto load = [stage](uint32_t(&to)[4], int offset) { load_matrices(to, stage + offset * 2); };
// Unrolled, two planes take more registers than there are.
#pragma unroll(kPlanes == 1 ? kDepth / 16 : 1)
  for (int step = 0; step < kDepth / 16; ++step) {
    uint32_t right[kPlanes][kAcross / 2][4];
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
#pragma unroll
      for (int pair = 0; pair < kAcross / 2; ++pair) {
        load(right[p][pair], side + p * kPlane + fragment_offset(right_first, 16 * pair, step));
      }
    }
#pragma unroll
    for (int down = 0; down < kDown; ++down) {
      uint32_t left[kPlanes][4];
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) load(left[p], p * kPlane + fragment_offset(left_first, 16 * down, step));
#pragma unroll
      for (int across = 0; across < kAcross; ++across) {
        if constexpr (kPlanes == 1) {
          const uint32_t(&b)[4] = right[0][across / 2];
          multiply_add(sum[down][across], left[0], b[across % 2 * 2], b[across % 2 * 2 + 1]);
        } else {
          float part[4] = {};
#pragma unroll
          for (int pass = 0; pass < passes(kPlanes); ++pass) {
            const uint32_t(&b)[4] = right[right_plane(kPlanes, pass)][across / 2];
            multiply_add(part, left[left_plane(kPlanes, pass)], b[across % 2 * 2], b[across % 2 * 2 + 1]);
          }
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[down][across][e] += part[e];
        }
      }
    }
  }
}

template <int kPlanes>
__global__ void __launch_bounds__(kThreads, 1) gram_kernel(const Gram<float> gram) {
  extern __shared__ __align__(128) uint8_t memory[];
  constexpr int kStages = stages(kPlanes);
  constexpr uint32_t kStageBytes = stage_elements(kPlanes) * 2;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const uint32_t ring = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
  const Tile tile = tile_of_block(gram, kEdge);
  const int64_t row = tile.row * kEdge, column = tile.column * kEdge, width = gram.columns.all();

  // Rows beyond the last are read as the last, and not stored.
  const uint16_t *left[kCopies], *right[kCopies];
#pragma unroll
  for (int copy = 0; copy < kCopies; ++copy) {
    const Piece at = copied(thread, copy);
    left[copy] = static_cast<const uint16_t*>(gram.left) + least(row + at.row, gram.n1 - 1) * width + at.piece * kPiece;
    right[copy] =
        static_cast<const uint16_t*>(gram.right) + least(column + at.row, gram.n2 - 1) * width + at.piece * kPiece;
  }
  const int steps = static_cast<int>(width / kDepth);
  const auto fetch = [&](int step) {
    if (step < steps) {
      const uint32_t stage = ring + step % kStages * kStageBytes;
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) {
#pragma unroll
        for (int copy = 0; copy < kCopies; ++copy) {
          const uint32_t to = stage + (p * kPlane + shared_offset(copied(thread, copy))) * 2;
          copy_async(to, left[copy] + p * gram.n1 * width + step * kDepth);
          copy_async(to + kPlanes * kPlane * 2, right[copy] + p * gram.n2 * width + step * kDepth);
        }
      }
    }
    commit();  // empty behind the last step, so that the number of pending groups says which stage is there
  };
  const int left_first = shared_offset(left_fragment(lane, warp_row(warp)));
  const int right_first = shared_offset(right_fragment(lane, warp_column(warp)));
  const auto advance = [&](int step, Accumulator& sum) {
    wait<kStages - 2>();
    __syncthreads();  // the stage is there for all, and all are past the one that is overwritten next
    fetch(step + kStages - 1);
    multiply_stage<kPlanes>(ring + step % kStages * kStageBytes, left_first, right_first, sum);
  };

#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) fetch(step);
  Accumulator inputs = {}, total = {};
  const int behind_inputs = static_cast<int>(gram.columns.inputs / kDepth);
  const int behind_slopes = behind_inputs + static_cast<int>(gram.columns.slopes() / kDepth);
  int step = 0;
  for (; step < behind_inputs; ++step) advance(step, inputs);
  for (; step < behind_slopes; ++step) advance(step, total);
#pragma unroll
  for (int down = 0; down < kDown; ++down) {
#pragma unroll
    for (int across = 0; across < kAcross; ++across) {
#pragma unroll
      for (int e = 0; e < 4; ++e) total[down][across][e] *= inputs[down][across][e] + gram.bias;
    }
  }
  for (; step < steps; ++step) advance(step, total);

#pragma unroll
  for (int down = 0; down < kDown; ++down) {
#pragma unroll
    for (int across = 0; across < kAcross; ++across) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const Tile at = result(warp, lane, down, across, e);
        store(gram, row + at.row, column + at.column, total[down][across][e]);
      }
    }
  }
}

template <int kPlanes>
cudaError_t launch(const Gram<float>& gram, cudaStream_t stream) {
  const int64_t grid = grid_of(gram, kEdge);
  if (grid == 0) return cudaSuccess;
  if (grid < 0) return cudaErrorInvalidConfiguration;
  constexpr int bytes = shared_bytes(kPlanes);
  const cudaError_t error =
      cudaFuncSetAttribute(gram_kernel<kPlanes>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  gram_kernel<kPlanes><<<static_cast<unsigned>(grid), kThreads, bytes, stream>>>(gram);
  return cudaGetLastError();
}

}  // namespace

cudaError_t gram_bfloat16(const Gram<float>& gram, int planes, cudaStream_t stream) {
  return planes == 1 ? launch<1>(gram, stream) : launch<2>(gram, stream);
}

}  // namespace mlp_fusion::cuda
