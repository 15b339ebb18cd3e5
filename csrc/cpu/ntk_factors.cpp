// Hidden values and slopes of a block: one product per row block, then the activation and its derivative together.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <memory>
#include <type_traits>

#include "ntk.h"
#include "parallel.h"
#include "products.h"
#include "simd.h"

namespace mlp_fusion {
namespace {

// Rows at a time: what is computed from them stays in the cache. Fixed, since results may depend on it by rounding.
constexpr int64_t kRows = 128;

constexpr double kHalfRoot = 0.70710678118654752440;        // 1 / √2
constexpr double kDensity = 0.39894228040143267794;         // 1 / √(2π)
constexpr double kTanhScale = 0.79788456080286535588;       // √(2/π)
constexpr double kTanhCube = 0.044715;

// Apply a pointwise function of PyTorch, in place: its vectors are better than the C library's loops.
template <class T>
void apply(const char* name, T* values, int64_t n) {
  constexpr auto dtype =
      std::is_same_v<T, double> ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float;
  const std::array<int64_t, 1> sizes{n}, strides{1};
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  std::array<StableIValue, 1> stack{torch::stable::detail::from(
      torch::stable::from_blob(values, {sizes.data(), 1}, {strides.data(), 1}, cpu, dtype))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<torch::stable::Tensor>(stack[0]);  // the returned reference, to be released
}

// The argument of the transcendental functions of phi and phi' at z: what is to be in `value` and `slope`.
template <class T>
MLP_INLINE void arguments_body(Activation activation, const T* z, int64_t n, T* value, T* slope) {
  switch (activation) {
    case Activation::gelu:
      for (int64_t i = 0; i < n; ++i) value[i] = z[i] * T(kHalfRoot);
      for (int64_t i = 0; i < n; ++i) slope[i] = T(-0.5) * z[i] * z[i];
      break;
    case Activation::gelu_tanh:
      for (int64_t i = 0; i < n; ++i) value[i] = T(kTanhScale) * (z[i] + T(kTanhCube) * z[i] * z[i] * z[i]);
      break;
    case Activation::quick_gelu:
      for (int64_t i = 0; i < n; ++i) value[i] = T(kQuickGelu) * z[i];
      break;
    case Activation::silu:
      for (int64_t i = 0; i < n; ++i) value[i] = z[i];
      break;
    case Activation::relu:
    case Activation::relu2:
      break;
  }
}

// phi(z) and phi'(z) from the functions of the arguments above.
template <class T>
MLP_INLINE void results_body(Activation activation, const T* z, int64_t n, T* value, T* slope) {
  switch (activation) {
    case Activation::gelu:
      for (int64_t i = 0; i < n; ++i) {
        const T cdf = T(0.5) * (T(1) + value[i]);
        value[i] = z[i] * cdf;
        slope[i] = cdf + z[i] * T(kDensity) * slope[i];
      }
      break;
    case Activation::gelu_tanh:
      for (int64_t i = 0; i < n; ++i) {
        const T t = value[i], inner = T(kTanhScale) * (T(1) + T(3 * kTanhCube) * z[i] * z[i]);
        value[i] = T(0.5) * z[i] * (T(1) + t);
        slope[i] = T(0.5) * (T(1) + t) + T(0.5) * z[i] * (T(1) - t * t) * inner;
      }
      break;
    case Activation::quick_gelu:
      for (int64_t i = 0; i < n; ++i) {
        const T s = value[i];
        value[i] = z[i] * s;
        slope[i] = s * (T(1) + T(kQuickGelu) * z[i] * (T(1) - s));
      }
      break;
    case Activation::silu:
      for (int64_t i = 0; i < n; ++i) {
        const T s = value[i];
        value[i] = z[i] * s;
        slope[i] = s * (T(1) + z[i] * (T(1) - s));
      }
      break;
    case Activation::relu:
      for (int64_t i = 0; i < n; ++i) {
        value[i] = z[i] > T(0) ? z[i] : T(0);
        slope[i] = z[i] > T(0) ? T(1) : T(0);
      }
      break;
    case Activation::relu2:
      for (int64_t i = 0; i < n; ++i) {
        const T positive = z[i] > T(0) ? z[i] : T(0);
        value[i] = positive * positive;
        slope[i] = T(2) * positive;
      }
      break;
  }
}

// z = (z + bias) shrink, row by row of length h.
template <class T>
MLP_INLINE void affine_body(const T* bias, const T* shrink, int64_t n, int64_t h, T* z) {
  for (int64_t i = 0; i < n; ++i, z += h) {
    if (bias != nullptr) {
      for (int64_t j = 0; j < h; ++j) z[j] += bias[j];
    }
    if (shrink != nullptr) {
      for (int64_t j = 0; j < h; ++j) z[j] *= shrink[j];
    }
  }
}

template <class T>
MLP_INLINE void plain_body(const T* of_hidden, const T* of_in, int64_t n, int64_t h, T* hidden, T* slopes) {
  for (int64_t i = 0; i < n; ++i, hidden += h, slopes += h) {
    for (int64_t j = 0; j < h; ++j) hidden[j] *= of_hidden[j];
    for (int64_t j = 0; j < h; ++j) slopes[j] *= of_in[j];
  }
}

// From phi(g), phi'(g) and z; the slopes have rows of length 2h.
template <class T>
MLP_INLINE void gated_body(const T* of_hidden, const T* of_in, const T* of_gate, const T* value, const T* slope,
                           const T* z, int64_t n, int64_t h, T* hidden, T* slopes) {
  for (int64_t i = 0; i < n; ++i, value += h, slope += h, z += h, hidden += h, slopes += 2 * h) {
    for (int64_t j = 0; j < h; ++j) hidden[j] = of_hidden[j] * value[j] * z[j];
    for (int64_t j = 0; j < h; ++j) slopes[j] = of_in[j] * value[j];
    for (int64_t j = 0; j < h; ++j) slopes[h + j] = of_gate[j] * slope[j] * z[j];
  }
}

// g within the limits of phi's argument, in place; `raw` is what it was.
template <class T>
MLP_INLINE void inside_body(T low, T high, int64_t n, T* g, T* raw) {
  for (int64_t i = 0; i < n; ++i) {
    raw[i] = g[i];
    g[i] = g[i] < low ? low : g[i] > high ? high : g[i];
  }
}

// From phi and its derivative within the limits, and z: what multiplies z, what z's slopes are, and both derivatives.
template <class T>
MLP_INLINE void limited_body(const Gate<T>& gate, const T* of_hidden, const T* of_in, const T* of_gate, const T* raw,
                             const T* value, const T* slope, const T* z, int64_t n, int64_t h, T* hidden, T* slopes) {
  for (int64_t i = 0; i < n; ++i, raw += h, value += h, slope += h, z += h, hidden += h, slopes += 2 * h) {
    for (int64_t j = 0; j < h; ++j) {
      const bool through_gate = raw[j] >= gate.low && raw[j] <= gate.high && value[j] <= gate.highest;
      const bool through_up = z[j] >= -gate.limit && z[j] <= gate.limit;
      const T s = value[j] > gate.highest ? gate.highest : value[j];
      const T up = (z[j] < -gate.limit ? -gate.limit : z[j] > gate.limit ? gate.limit : z[j]) + gate.offset;
      hidden[j] = of_hidden[j] * s * up;
      slopes[j] = through_up ? of_in[j] * s : T(0);
      slopes[h + j] = through_gate ? of_gate[j] * slope[j] * up : T(0);
    }
  }
}

template <class T>
MLP_INLINE void signs_body(T* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) values[i] = T(values[i] > T(0)) - T(values[i] < T(0));
}

#define MLP_FOR_BOTH(define) define(float) define(double)
#define MLP_DEFINE(T)                                                                                                \
  MLP_CLONES void arguments(Activation activation, const T* z, int64_t n, T* value, T* slope) {                      \
    arguments_body(activation, z, n, value, slope);                                                                  \
  }                                                                                                                  \
  MLP_CLONES void results(Activation activation, const T* z, int64_t n, T* value, T* slope) {                        \
    results_body(activation, z, n, value, slope);                                                                    \
  }                                                                                                                  \
  MLP_CLONES void affine(const T* bias, const T* shrink, int64_t n, int64_t h, T* z) {                               \
    affine_body(bias, shrink, n, h, z);                                                                              \
  }                                                                                                                  \
  MLP_CLONES void plain(const T* of_hidden, const T* of_in, int64_t n, int64_t h, T* hidden, T* slopes) {            \
    plain_body(of_hidden, of_in, n, h, hidden, slopes);                                                              \
  }                                                                                                                  \
  MLP_CLONES void gated(const T* of_hidden, const T* of_in, const T* of_gate, const T* value, const T* slope,        \
                        const T* z, int64_t n, int64_t h, T* hidden, T* slopes) {                                    \
    gated_body(of_hidden, of_in, of_gate, value, slope, z, n, h, hidden, slopes);                                    \
  }                                                                                                                  \
  MLP_CLONES void inside(T low, T high, int64_t n, T* g, T* raw) { inside_body(low, high, n, g, raw); }              \
  MLP_CLONES void limited(const Gate<T>& gate, const T* of_hidden, const T* of_in, const T* of_gate, const T* raw,   \
                          const T* value, const T* slope, const T* z, int64_t n, int64_t h, T* hidden, T* slopes) {  \
    limited_body(gate, of_hidden, of_in, of_gate, raw, value, slope, z, n, h, hidden, slopes);                       \
  }                                                                                                                  \
  MLP_CLONES void take_signs(T* values, int64_t n) { signs_body(values, n); }
MLP_FOR_BOTH(MLP_DEFINE)
#undef MLP_DEFINE
#undef MLP_FOR_BOTH

// value = phi(z) and slope = phi'(z).
template <class T>
void activate(Activation activation, const T* z, int64_t n, T* value, T* slope) {
  arguments(activation, z, n, value, slope);
  if (activation == Activation::gelu) {
    apply("aten::erf_", value, n);
    apply("aten::exp_", slope, n);
  } else if (activation == Activation::gelu_tanh) {
    apply("aten::tanh_", value, n);
  } else if (activation == Activation::quick_gelu || activation == Activation::silu) {
    apply("aten::sigmoid_", value, n);
  }
  results(activation, z, n, value, slope);
}

}  // namespace

template <class T>
void block_factors(const Neurons<T>& neurons, const T* x, int64_t n, T* hidden, T* slopes) {
  const int64_t d = neurons.d, h = neurons.h, blocks = (n + kRows - 1) / kRows;
  // Not by w_gate, which is null as well where d is 0.
  const bool gated_block = neurons.of_gate != nullptr, limited_block = gated_block && !neurons.gate.plain();
  const int64_t width = gated_block ? 2 * h : h;
  if (h == 0) return;
  for_each_alone(blocks, [&](int64_t block) {
    const int64_t begin = block * kRows, rows = std::min(kRows, n - begin), count = rows * h;
    const T* const inputs = x + begin * d;
    T *const to_hidden = hidden + begin * h, *const to_slopes = slopes + begin * width;
    const std::unique_ptr<T[]> scratch(new T[(limited_block ? 5 : gated_block ? 4 : 1) * count]);
    T* const z = scratch.get();
    multiply_transposed(inputs, rows, d, neurons.w_in, h, d, d, z, h);
    if (gated_block) {
      T *const g = z + count, *const value = g + count, *const slope = value + count;
      affine(neurons.b_in, neurons.shrink, rows, h, z);
      multiply_transposed(inputs, rows, d, neurons.w_gate, h, d, d, g, h);
      affine(neurons.b_gate, neurons.shrink, rows, h, g);
      T* const raw = slope + count;
      if (limited_block) inside(neurons.gate.low, neurons.gate.high, count, g, raw);
      activate(neurons.activation, g, count, value, slope);
      if (limited_block) {
        limited(neurons.gate, neurons.of_hidden, neurons.of_in, neurons.of_gate, raw, value, slope, z, rows, h, to_hidden,
                to_slopes);
      } else {
        gated(neurons.of_hidden, neurons.of_in, neurons.of_gate, value, slope, z, rows, h, to_hidden, to_slopes);
      }
    } else {
      affine(neurons.b_in, neurons.shrink, rows, h, z);
      activate(neurons.activation, z, count, to_hidden, to_slopes);
      plain(neurons.of_hidden, neurons.of_in, rows, h, to_hidden, to_slopes);
    }
    if (neurons.signs) {
      take_signs(to_hidden, count);
      take_signs(to_slopes, rows * width);
    }
  });
}

template void block_factors(const Neurons<float>&, const float*, int64_t, float*, float*);
template void block_factors(const Neurons<double>&, const double*, int64_t, double*, double*);

}  // namespace mlp_fusion
