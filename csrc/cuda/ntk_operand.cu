#include <algorithm>

#include "ntk.h"

namespace mlp_fusion::cuda {
namespace {

constexpr int kThreads = 256;

// One thread per value of one row and the rows behind it by the height of the grid: neighbouring threads read and write
// neighbouring columns.
template <class T, Format format>
__global__ void __launch_bounds__(kThreads) operand_kernel(const Factors<T> factors, void* operand) {
  const int64_t columns = factors.columns.all(), column = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (column >= columns) return;
  for (int64_t row = blockIdx.y; row < factors.n; row += gridDim.y) {
    const T value = operand_value(factors, row, column);
    const int64_t at = row * columns + column;
    if constexpr (format == Format::plain) {
      static_cast<T*>(operand)[at] = value;
    } else if constexpr (format == Format::tf32_twice) {
      float* const to = static_cast<float*>(operand);
      const float high = to_tf32(value);
      to[at] = high;
      to[factors.n * columns + at] = to_tf32(left_of(value, high));
    } else {
      uint16_t* const to = static_cast<uint16_t*>(operand);
      const uint16_t high = to_bfloat16(value);
      to[at] = high;
      if constexpr (format == Format::bfloat16_twice) {
        to[factors.n * columns + at] = to_bfloat16(left_of(value, from_bfloat16(high)));
      }
    }
  }
}

}  // namespace

template <class T>
cudaError_t write_operand(const Factors<T>& factors, Format format, void* operand, cudaStream_t stream) {
  const int64_t columns = factors.columns.all();
  if (factors.n == 0 || columns == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>((columns + kThreads - 1) / kThreads),
                  static_cast<unsigned>(std::min<int64_t>(factors.n, 65535)));
  if (format == Format::plain) {
    operand_kernel<T, Format::plain><<<grid, kThreads, 0, stream>>>(factors, operand);
  } else if constexpr (sizeof(T) == sizeof(float)) {
    if (format == Format::bfloat16) {
      operand_kernel<T, Format::bfloat16><<<grid, kThreads, 0, stream>>>(factors, operand);
    } else if (format == Format::tf32_twice) {
      operand_kernel<T, Format::tf32_twice><<<grid, kThreads, 0, stream>>>(factors, operand);
    } else {
      operand_kernel<T, Format::bfloat16_twice><<<grid, kThreads, 0, stream>>>(factors, operand);
    }
  } else {
    return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

template cudaError_t write_operand(const Factors<float>&, Format, void*, cudaStream_t);
template cudaError_t write_operand(const Factors<double>&, Format, void*, cudaStream_t);

}  // namespace mlp_fusion::cuda
