// One side of the products as the tile kernels read it: a row of inputs, slopes and hidden values, side by side.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../activation.h"
#include "../gate.h"
#include "layout.h"

namespace mlp_fusion::cuda {

// What there is of each kind, in columns, padded; they lie in this order. Slopes `in` and `gate` make one product.
struct Columns {
  int64_t inputs, in, gate, hidden;

  MLP_HD int64_t slopes() const { return in + gate; }
  MLP_HD int64_t all() const { return inputs + in + gate + hidden; }
};

// The values of a block's n rows and what multiplies them, neuron by neuron; csrc/cpu/ntk.h has the formulas. z and g
// (n, h) are pre-activations, biases included; null g: a plain block; null shrink: none.
template <class T>
struct Factors {
  const T *x, *z, *g, *shrink, *of_hidden, *of_in, *of_gate;
  int64_t n, d, h;
  Columns columns;
  Activation activation;
  Gate<T> gate;
  bool signs;
};

template <class T>
MLP_HD T activated(Activation activation, T z) {
  switch (activation) {
    case Activation::gelu:
      return T(0.5) * z * (T(1) + std::erf(z * T(0.70710678118654752440)));
    case Activation::gelu_tanh:
      return T(0.5) * z * (T(1) + std::tanh(T(0.79788456080286535588) * (z + T(0.044715) * z * z * z)));
    case Activation::quick_gelu:
      return z / (T(1) + std::exp(T(-kQuickGelu) * z));
    case Activation::relu:
      return z > T(0) ? z : T(0);
    case Activation::relu2:
      return z > T(0) ? z * z : T(0);
    case Activation::silu:
      break;
  }
  return z / (T(1) + std::exp(-z));
}

template <class T>
MLP_HD T derivative(Activation activation, T z) {
  switch (activation) {
    case Activation::gelu:
      return T(0.5) * (T(1) + std::erf(z * T(0.70710678118654752440))) +
             z * T(0.39894228040143267794) * std::exp(T(-0.5) * z * z);
    case Activation::gelu_tanh: {
      const T t = std::tanh(T(0.79788456080286535588) * (z + T(0.044715) * z * z * z));
      const T inner = T(0.79788456080286535588) * (T(1) + T(3 * 0.044715) * z * z);
      return T(0.5) * (T(1) + t) + T(0.5) * z * (T(1) - t * t) * inner;
    }
    case Activation::quick_gelu: {
      const T s = T(1) / (T(1) + std::exp(T(-kQuickGelu) * z));
      return s * (T(1) + T(kQuickGelu) * z * (T(1) - s));
    }
    case Activation::relu:
      return z > T(0) ? T(1) : T(0);
    case Activation::relu2:
      return z > T(0) ? T(2) * z : T(0);
    case Activation::silu:
      break;
  }
  const T s = T(1) / (T(1) + std::exp(-z));
  return s * (T(1) + z * (T(1) - s));
}

template <class T>
MLP_HD T within(T x, T low, T high) {
  return x < low ? low : x > high ? high : x;
}

// The value in `column` of `row`; 0 where a range is padded.
template <class T>
MLP_HD T operand_value(const Factors<T>& f, int64_t row, int64_t column) {
  T value = T(0);
  if (column < f.columns.inputs) {
    if (column < f.d) value = f.x[row * f.d + column];
  } else {
    column -= f.columns.inputs;
    const bool of_in = column < f.columns.in;
    if (!of_in) column -= f.columns.in;
    const bool of_gate = !of_in && column < f.columns.gate;
    if (!of_in && !of_gate) column -= f.columns.gate;
    if (column < f.h) {
      const int64_t at = row * f.h + column;
      const T shrink = f.shrink == nullptr ? T(1) : f.shrink[column], z = f.z[at] * shrink;
      if (f.g == nullptr) {
        value = of_in ? f.of_in[column] * derivative(f.activation, z) : f.of_hidden[column] * activated(f.activation, z);
      } else {
        const Gate<T>& gate = f.gate;
        const T g = f.g[at] * shrink, inside = within(g, gate.low, gate.high), phi = activated(f.activation, inside);
        const T s = phi > gate.highest ? gate.highest : phi, up = within(z, -gate.limit, gate.limit) + gate.offset;
        if (of_in) {
          value = z >= -gate.limit && z <= gate.limit ? f.of_in[column] * s : T(0);
        } else if (of_gate) {
          const bool through = g >= gate.low && g <= gate.high && phi <= gate.highest;
          value = through ? f.of_gate[column] * derivative(f.activation, inside) * up : T(0);
        } else {
          value = f.of_hidden[column] * s * up;
        }
      }
    }
  }
  return f.signs ? T((value > T(0)) - (value < T(0))) : value;
}

// The bfloat16 nearest to a value, ties to even, as its bits; and the value of such bits. NaN stays NaN: the carry of one
// of all ones would run into its sign.
MLP_HD uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
MLP_HD float from_bfloat16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The value of TF32, 11 significant bits, nearest to a value, ties to even; NaN stays NaN.
MLP_HD float to_tf32(float value) {
  if (value != value) return value;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = (bits + 0xfff + ((bits >> 13) & 1)) & ~uint32_t{0x1fff};
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// What rounding a value to `high` has left of it: nothing of what is not finite, or has become so.
MLP_HD float left_of(float value, float high) { return high - high == 0.0f ? value - high : 0.0f; }

}  // namespace mlp_fusion::cuda
