#include "products.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <type_traits>
#include <vector>

#include "bfloat16.h"
#include "parallel.h"
#include "simd.h"

namespace mlp_fusion {
namespace {

using torch::stable::Tensor;

// Rows of a panel of the Gram matrix, and of the tiles that are mirrored.
constexpr int64_t kPanel = 256;
constexpr int64_t kMirror = 32;

template <class T>
Tensor matrix(const T* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  constexpr auto dtype =
      std::is_same_v<T, double> ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float;
  const std::array<int64_t, 2> sizes{rows, columns}, strides{row_stride, column_stride};
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(const_cast<T*>(data), {sizes.data(), 2}, {strides.data(), 2}, cpu, dtype);
}

// The part of g above the diagonal, from the part below, for columns [begin, end) of the latter.
template <class T>
void mirror(T* g, int64_t n, int64_t stride, int64_t begin, int64_t end) {
  for (int64_t i0 = begin; i0 < n; i0 += kMirror) {
    for (int64_t j0 = begin; j0 < end; j0 += kMirror) {
      const int64_t i1 = std::min(i0 + kMirror, n), j1 = std::min(j0 + kMirror, end);
      for (int64_t j = j0; j < j1; ++j) {
        for (int64_t i = std::max(i0, j + 1); i < i1; ++i) g[j * stride + i] = g[i * stride + j];
      }
    }
  }
}

template <class T>
void clear_padding(T* rows, int64_t count, int64_t columns, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) std::fill(rows + i * stride + columns, rows + (i + 1) * stride, T{0});
}

// g += factor x xᵀ of one problem in float32, up to the diagonal. Rows begin where those of any other problem would: a
// product's bits can depend on where in memory, and so where in the batch, they lie.
template <class In>
void add_plain_products(const In* x, int64_t n, int64_t k, float factor, float* g, int64_t stride) {
  const int64_t width = padded(k), panels = (n + kPanel - 1) / kPanel;
  const auto aligned = [](int64_t size) {
    const auto floats = static_cast<float*>(std::aligned_alloc(sizeof(float) * kPad, size * sizeof(float)));
    STD_TORCH_CHECK(floats != nullptr || size == 0, "add_products: out of memory");
    return std::unique_ptr<float, decltype(&std::free)>(floats, &std::free);
  };
  const auto rows = aligned(n * width);
  for_each(n, [&](int64_t i) {
    widen(x + i * k, k, rows.get() + i * width);
    std::fill_n(rows.get() + i * width + k, width - k, 0.0f);
  });
  for_each_alone(panels, [&](int64_t item) {
    const int64_t begin = (panels - 1 - item) * kPanel, end = std::min(begin + kPanel, n), apart = padded(end);
    const auto products = aligned((end - begin) * apart);
    multiply_transposed(rows.get() + begin * width, end - begin, width, rows.get(), end, width, width, products.get(),
                        apart);
    for (int64_t i = begin; i < end; ++i) {
      const float* own = products.get() + (i - begin) * apart;
      for (int64_t j = 0; j <= i; ++j) g[i * stride + j] += factor * own[j];
    }
  });
}

}  // namespace

template <class T>
void multiply_transposed(const T* a, int64_t m, int64_t a_stride, const T* b, int64_t n, int64_t b_stride, int64_t k,
                         T* c, int64_t c_stride) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(matrix(a, m, k, a_stride, 1)),
      torch::stable::detail::from(matrix(b, k, n, 1, b_stride)),
      torch::stable::detail::from(matrix(c, m, n, c_stride, 1)),
  };
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the returned reference to c, to be released
}

template <class T>
void mirror_all(T* g, int64_t batch, int64_t n, int64_t stride) {
  for_each(batch * ((n + kPanel - 1) / kPanel), [&](int64_t item) {
    const int64_t begin = item / batch * kPanel;
    mirror(g + item % batch * n * stride, n, stride, begin, std::min(begin + kPanel, n));
  });
}

template <class T>
void gram_matrices(const T* x, int64_t batch, int64_t n, int64_t k, T* g, int64_t stride) {
  const int64_t panels = (n + kPanel - 1) / kPanel;
  // The widest panels first, so that the threads finish together.
  for_each_alone(batch * panels, [&](int64_t item) {
    const int64_t problem = item % batch, panel = panels - 1 - item / batch;
    const int64_t begin = panel * kPanel, end = std::min(begin + kPanel, n);
    const T* points = x + problem * n * k;
    T* rows = g + problem * n * stride + begin * stride;
    multiply_transposed(points + begin * k, end - begin, k, points, end, k, k, rows, stride);
    clear_padding(rows, end - begin, n, stride);
  });
  mirror_all(g, batch, n, stride);
}

template <class In>
void add_products(const In* x, const double* factors, int64_t batch, int64_t n, int64_t k, float* g, int64_t stride) {
  const int64_t groups = packed_points(n) / kPackedPoints, size = packed_pairs(k) * kPackedPoints;
  const int64_t panels = (n + kPanelRows - 1) / kPanelRows;
  std::unique_ptr<uint32_t[]> packed(has_bfloat16_products() ? new uint32_t[groups * size] : nullptr);
  std::vector<char> exact(groups);
  for (int64_t b = 0; b < batch; ++b) {
    if (factors[b] == 0) continue;
    const In* points = x + b * n * k;
    float* own = g + b * n * stride;
    const float factor = static_cast<float>(factors[b]);
    for_each(packed == nullptr ? 0 : groups, [&](int64_t group) {
      const int64_t begin = group * kPackedPoints, count = std::clamp<int64_t>(n - begin, 0, kPackedPoints);
      exact[group] = pack_bfloat16(points + begin * k, count, k, packed.get() + group * size);
    });
    if (packed == nullptr || !std::all_of(exact.begin(), exact.end(), [](char all) { return all; })) {
      add_plain_products(points, n, k, factor, own, stride);
      continue;
    }
    for_each(panels, [&](int64_t item) {
      const int64_t begin = (panels - 1 - item) * kPanelRows, end = std::min(begin + kPanelRows, n);
      add_bfloat16_products(packed.get(), k, begin, end, n, factor, own, stride);
    });
  }
}

template <class T>
void cross_products(const T* a, const T* x, int64_t batch, int64_t m, int64_t n, int64_t k, T* out, int64_t stride) {
  const int64_t panels = (n + kPanel - 1) / kPanel;
  for_each_alone(batch * panels, [&](int64_t item) {
    const int64_t problem = item % batch, begin = item / batch * kPanel, end = std::min(begin + kPanel, n);
    multiply_transposed(a + problem * m * k, m, k, x + (problem * n + begin) * k, end - begin, k, k,
                        out + problem * m * stride + begin, stride);
  });
  for_each(batch, [&](int64_t problem) { clear_padding(out + problem * m * stride, m, n, stride); });
}

template void multiply_transposed(const float*, int64_t, int64_t, const float*, int64_t, int64_t, int64_t, float*,
                                  int64_t);
template void multiply_transposed(const double*, int64_t, int64_t, const double*, int64_t, int64_t, int64_t, double*,
                                  int64_t);
template void gram_matrices(const float*, int64_t, int64_t, int64_t, float*, int64_t);
template void gram_matrices(const double*, int64_t, int64_t, int64_t, double*, int64_t);
template void add_products(const float*, const double*, int64_t, int64_t, int64_t, float*, int64_t);
template void add_products(const uint16_t*, const double*, int64_t, int64_t, int64_t, float*, int64_t);
template void mirror_all(float*, int64_t, int64_t, int64_t);
template void cross_products(const float*, const float*, int64_t, int64_t, int64_t, int64_t, float*, int64_t);
template void cross_products(const double*, const double*, int64_t, int64_t, int64_t, int64_t, double*, int64_t);

}  // namespace mlp_fusion
