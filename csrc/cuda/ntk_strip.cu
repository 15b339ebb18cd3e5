// Sums over strips of two kernels, in double and in one order: no sum depends on which block is first.
#include "ntk.h"

namespace mlp_fusion::cuda {
namespace {

using namespace strips;

// Leave the sum of every thread's value in values[0]; all threads are here.
__device__ __forceinline__ void add_up(double* values, int thread) {
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) values[thread] += values[thread + half];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) columns_kernel(const Strip<T> strip) {
  __shared__ double shared[4][kThreads];
  const int thread = threadIdx.x;
  const int64_t column = int64_t{blockIdx.x} * kThreads + thread;
  const Products own = column < strip.columns ? column_products(strip, column) : Products{};
  MLP_UNROLL for (int k = 0; k < 4; ++k) shared[k][thread] = own.value[k];
  MLP_UNROLL for (int k = 0; k < 4; ++k) add_up(shared[k], thread);
  if (thread == 0) {
    MLP_UNROLL for (int k = 0; k < 4; ++k) strip.sums[int64_t{blockIdx.x} * 4 + k] += shared[k][0];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) rows_kernel(const Strip<T> strip) {
  __shared__ double shared[2][kThreads];
  const int thread = threadIdx.x;
  const int64_t row = blockIdx.x;
  const Margins own = row_margins(strip, row, thread);
  shared[0][thread] = own.a;
  shared[1][thread] = own.b;
  MLP_UNROLL for (int k = 0; k < 2; ++k) add_up(shared[k], thread);
  if (thread == 0) {
    MLP_UNROLL for (int k = 0; k < 2; ++k) strip.of_rows[k * strip.row_stride + row] += shared[k][0];
  }
}

}  // namespace

template <class T>
cudaError_t strip_sums(const Strip<T>& strip, cudaStream_t stream) {
  if (strip.rows == 0 || strip.columns == 0) return cudaSuccess;
  if (strip.rows > kMostBlocks || groups(strip.columns) > kMostBlocks) return cudaErrorInvalidConfiguration;
  columns_kernel<T><<<static_cast<unsigned>(groups(strip.columns)), kThreads, 0, stream>>>(strip);
  rows_kernel<T><<<static_cast<unsigned>(strip.rows), kThreads, 0, stream>>>(strip);
  return cudaGetLastError();
}

template cudaError_t strip_sums(const Strip<float>&, cudaStream_t);
template cudaError_t strip_sums(const Strip<double>&, cudaStream_t);

}  // namespace mlp_fusion::cuda
