// Tiles of K on tensor cores: mma.sync on bfloat16 or TF32, operands through a ring of stages in shared memory.
#include "ntk.h"

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

// One warp at work on one stage, of values of kWords elements of 16 bits: bfloat16, or TF32.
template <int kPlanes, int kWords>
struct Warp {
  struct Fragment {
    uint32_t r[4];
  };
  struct Sum {
    float e[4];
  };

  uint32_t stage;                // address in shared memory
  int left_first, right_first;   // offsets in a plane of this lane's row of the first fragments

  __device__ __forceinline__ Fragment load(int offset) const {
    Fragment to;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to.r[0]), "=r"(to.r[1]), "=r"(to.r[2]), "=r"(to.r[3])
                 : "r"(stage + offset * 2)
                 : "memory");
    return to;
  }
  __device__ __forceinline__ Fragment left(int plane, int rows, int step) const {
    return load(plane_offset(kPlanes, 0, plane) + fragment_offset(left_first, rows, step));
  }
  __device__ __forceinline__ Fragment right(int plane, int rows, int step) const {
    return load(plane_offset(kPlanes, 1, plane) + fragment_offset(right_first, rows, step));
  }
  __device__ __forceinline__ void multiply_add(Sum& c, const Fragment& a, const Fragment& b, int half) const {
    if constexpr (kWords == 1) {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
          "{%0, %1, %2, %3};"
          : "+f"(c.e[0]), "+f"(c.e[1]), "+f"(c.e[2]), "+f"(c.e[3])
          : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[2 * half]), "r"(b.r[2 * half + 1]));
    } else {
      asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
          "{%0, %1, %2, %3};"
          : "+f"(c.e[0]), "+f"(c.e[1]), "+f"(c.e[2]), "+f"(c.e[3])
          : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[2 * half]), "r"(b.r[2 * half + 1]));
    }
  }
  __device__ __forceinline__ void add(Sum& sum, const Sum& part) const {
    MLP_UNROLL for (int e = 0; e < 4; ++e) sum.e[e] += part.e[e];
  }
};

template <int kPlanes, int kWords>
__global__ void __launch_bounds__(kThreads, 1) gram_kernel(const Gram<float> gram) {
  extern __shared__ __align__(128) uint8_t memory[];
  constexpr int kStages = stages(kPlanes);
  constexpr uint32_t kStageBytes = stage_elements(kPlanes) * 2;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const uint32_t ring = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
  const Tile tile = tile_of(gram, kEdge, blockIdx.x);
  const int64_t row = tile.row * kEdge, column = tile.column * kEdge, width = gram.columns.all() * kWords;

  // Rows beyond the last are read as the last, and not stored.
  const uint16_t *left[kCopies], *right[kCopies];
  MLP_UNROLL for (int copy = 0; copy < kCopies; ++copy) {
    const Piece at = copied(thread, copy);
    left[copy] = static_cast<const uint16_t*>(gram.left) + least(row + at.row, gram.n1 - 1) * width + at.piece * kPiece;
    right[copy] =
        static_cast<const uint16_t*>(gram.right) + least(column + at.row, gram.n2 - 1) * width + at.piece * kPiece;
  }
  const int64_t left_plane = gram.left_plane * kWords, right_plane = gram.right_plane * kWords;
  const int steps = static_cast<int>(width / kDepth);
  const auto fetch = [&](int step) {
    if (step < steps) {
      const uint32_t stage = ring + step % kStages * kStageBytes;
      MLP_UNROLL for (int p = 0; p < kPlanes; ++p) {
        MLP_UNROLL for (int copy = 0; copy < kCopies; ++copy) {
          const int at = shared_offset(copied(thread, copy));
          copy_async(stage + (plane_offset(kPlanes, 0, p) + at) * 2, left[copy] + p * left_plane + step * kDepth);
          copy_async(stage + (plane_offset(kPlanes, 1, p) + at) * 2, right[copy] + p * right_plane + step * kDepth);
        }
      }
    }
    commit();  // empty behind the last step, so that the number of pending groups says which stage is there
  };
  const int left_first = shared_offset(left_fragment(lane, warp_row(warp)));
  const int right_first = shared_offset(right_fragment(lane, warp_column(warp)));
  using Sum = typename Warp<kPlanes, kWords>::Sum;
  const auto advance = [&](int step, Sum(&sum)[kDown][kAcross]) {
    wait<kStages - 2>();
    __syncthreads();  // the stage is there for all, and all are past the one that is overwritten next
    fetch(step + kStages - 1);
    const uint32_t stage = ring + step % kStages * kStageBytes;
    multiply_stage<kPlanes>(Warp<kPlanes, kWords>{stage, left_first, right_first}, sum);
  };

  MLP_UNROLL for (int step = 0; step < kStages - 1; ++step) fetch(step);
  Sum inputs[kDown][kAcross] = {}, total[kDown][kAcross] = {};
  const int behind_inputs = static_cast<int>(gram.columns.inputs * kWords / kDepth);
  const int behind_slopes = behind_inputs + static_cast<int>(gram.columns.slopes() * kWords / kDepth);
  int step = 0;
  for (; step < behind_inputs; ++step) advance(step, inputs);
  for (; step < behind_slopes; ++step) advance(step, total);
  MLP_UNROLL for (int down = 0; down < kDown; ++down) {
    MLP_UNROLL for (int across = 0; across < kAcross; ++across) {
      MLP_UNROLL for (int e = 0; e < 4; ++e) total[down][across].e[e] *= inputs[down][across].e[e] + gram.bias;
    }
  }
  for (; step < steps; ++step) advance(step, total);

  const bool inner = is_inner(gram, tile, kEdge);
  MLP_UNROLL for (int down = 0; down < kDown; ++down) {
    MLP_UNROLL for (int across = 0; across < kAcross; ++across) {
      MLP_UNROLL for (int e = 0; e < 4; ++e) {
        const Tile at = result(warp, lane, down, across, e);
        store(gram, inner, row + at.row, column + at.column, total[down][across].e[e]);
      }
    }
  }
}

template <int kPlanes, int kWords>
cudaError_t launch(const Gram<float>& gram, cudaStream_t stream) {
  const int64_t grid = tiles_of(gram, kEdge);
  if (grid == 0) return cudaSuccess;
  if (grid > kMostBlocks) return cudaErrorInvalidConfiguration;
  constexpr int bytes = shared_bytes(kPlanes);
  const cudaError_t error =
      cudaFuncSetAttribute(gram_kernel<kPlanes, kWords>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  gram_kernel<kPlanes, kWords><<<static_cast<unsigned>(grid), kThreads, bytes, stream>>>(gram);
  return cudaGetLastError();
}

}  // namespace

cudaError_t gram_tensor_cores(const Gram<float>& gram, Format format, cudaStream_t stream) {
  if (format == Format::bfloat16) return launch<1, 1>(gram, stream);
  return format == Format::tf32_twice ? launch<2, 2>(gram, stream) : launch<2, 1>(gram, stream);
}

}  // namespace mlp_fusion::cuda
