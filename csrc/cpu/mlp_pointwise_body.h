// What mlp_pointwise_*.cpp compile, each for one element type: they take half of the time that the library needs, and so
// are files that compile side by side.
#pragma once

#include "mlp_pointwise.h"

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace mlp_fusion {
namespace {

// Vectors are as wide as the registers of the instruction set that a function is compiled for: GCC takes wider ones apart
// through memory. Everything below is a template over the vector, or over its bytes.
template <class T, int Bytes>
struct VectorOf {
  typedef T Type __attribute__((vector_size(Bytes)));
};
template <class T, int Bytes>
using Vec = typename VectorOf<T, Bytes>::Type;
template <class V>
using Element = std::remove_cvref_t<decltype(V{}[0])>;

// What exp and the normal distribution need to know of an element type. `tail` are the coefficients, lowest first, of
// P(q) with erfc(s) = 2 exp(-s²) P(q) / (s + k), q = (s - k) / (s + k) and k = 2.5: Chebyshev interpolants, computed in
// 50 digits. `log2e` to `ln2_low` reduce exp's argument to |r| <= ln2 / 2, for which `exp` are 1 / i!.
template <class T>
struct Constants;

template <>
struct Constants<float> {
  using Integer = int32_t;
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  static constexpr int32_t kBias = 127, kMantissa = 23;
  static constexpr float kLeast = -87.0f;  // below, exp counts as 0
  static constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.42860682030941723e-6f;
  static constexpr float kExp[] = {1.0f, 1.0f, 0.5f, 1.66666667e-1f, 4.16666667e-2f, 8.33333333e-3f, 1.38888889e-3f,
                                   1.98412698e-4f};
  static constexpr float kTail[] = {0.5270159072f,    -0.4023259254f,   0.2269572684f,    -0.08562552228f,
                                    0.01417829591f,   0.004195920514f,  -0.002398563096f, -0.0002169067802f,
                                    0.0003295116577f, 2.344095109e-5f,  -3.502672846e-5f, -3.61161362e-6f};
};

template <>
struct Constants<double> {
  using Integer = int64_t;
  static constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int64_t kBias = 1023, kMantissa = 52;
  static constexpr double kLeast = -708.0;
  static constexpr double kLn2High = 0.693147180369123816490, kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kExp[] = {1.0,
                                    1.0,
                                    1.0 / 2,
                                    1.0 / 6,
                                    1.0 / 24,
                                    1.0 / 120,
                                    1.0 / 720,
                                    1.0 / 5040,
                                    1.0 / 40320,
                                    1.0 / 362880,
                                    1.0 / 3628800,
                                    1.0 / 39916800,
                                    1.0 / 479001600,
                                    1.0 / 6227020800};
  static constexpr double kTail[] = {
      0.527015910152858952,     -0.402325924719574066,    0.2269570583240486,       -0.0856255726230620923,
      0.0141807750659692007,    0.00419652215244743364,   -0.00240939276107296846,  -0.000219604150844811411,
      0.000351346856536762931,  0.0000291540346222383947, -0.0000563023828865657201, -9.76669054068464287e-6,
      9.12204793289983811e-6,   3.37874581399073492e-6,   -1.1657437454767716e-6,   -9.8416359877534871e-7,
      -3.77570730819525214e-9,  2.27237372418897643e-7,   7.00281624710309165e-8,   -3.71737854563948931e-8,
      -2.71256525657198059e-8,  3.26055024545487806e-9,   5.78813185454912734e-9,   -2.24613595095671902e-11,
      -5.87636788078608722e-10};
};

template <class V>
constexpr int64_t kWidth = sizeof(V) / sizeof(Element<V>);

template <class V>
using Integers = Vec<typename Constants<Element<V>>::Integer, sizeof(V)>;

// Even and odd powers apart: two short chains of dependent operations instead of a long one.
template <class V, int N>
MLP_INLINE V polynomial(const Element<V> (&coefficients)[N], V x) {
  const V square = x * x;
  V sums[2] = {V{} + coefficients[N - 2], V{} + coefficients[N - 1]};
#pragma GCC unroll 32
  for (int i = N - 3; i >= 0; --i) sums[(N - i) % 2] = sums[(N - i) % 2] * square + coefficients[i];
  return N % 2 == 0 ? sums[0] + x * sums[1] : sums[0] * x + sums[1];
}

// exp(x) for x <= 0.
template <class V>
MLP_INLINE V exp_negative(V x) {
  using T = Element<V>;
  using C = Constants<T>;
  using I = Integers<V>;
  const V bounded = x < C::kLeast ? V{} + C::kLeast : x;
  const V shifted = bounded * static_cast<T>(1.4426950408889634) + C::kMagic;
  const V n = shifted - C::kMagic;
  const V r = (bounded - n * C::kLn2High) - n * C::kLn2Low;
  const I exponent = (I)shifted - (I)(V{} + C::kMagic);
  const V power = (V)((exponent + C::kBias) << C::kMantissa);
  const V value = polynomial(C::kExp, r) * power;
  return x < C::kLeast ? V{} : value;
}

// s = 1 / (1 + exp(-x)) and c = 1 - s, both without cancellation.
template <class V>
MLP_INLINE void sigmoid(V x, V& s, V& c) {
  using T = Element<V>;
  const V e = exp_negative(x < T{0} ? x : -x);
  const V larger = T{1} / (T{1} + e), smaller = e * larger;
  s = x < T{0} ? smaller : larger;
  c = x < T{0} ? larger : smaller;
}

// phi(x) and its derivative.
template <Activation Phi, class V>
MLP_INLINE void evaluate(V x, V& value, V& slope) {
  using T = Element<V>;
  if constexpr (Phi == Activation::gelu) {
    // From the tail of the normal distribution, which also gives the density.
    constexpr T k = T(2.5);
    const V e = exp_negative(T(-0.5) * x * x);
    const V s = (x < T{0} ? -x : x) * static_cast<T>(0.70710678118654752);
    const V w = T{1} / (s + k);
    const V tail = e * w * polynomial(Constants<T>::kTail, T{1} - (2 * k) * w);
    const V below = (x < T{0} ? tail : T{1} - tail);
    value = x * below;
    slope = below + x * e * static_cast<T>(0.39894228040143268);
  } else if constexpr (Phi == Activation::gelu_tanh) {
    // (1 + tanh(u)) / 2 is the sigmoid of 2u.
    constexpr T c = T(1.5957691216057308), cubic = T(0.044715);
    V s, rest;
    const V square = x * x;
    sigmoid(c * x * (T{1} + cubic * square), s, rest);
    value = x * s;
    slope = s + x * s * rest * (c * (T{1} + (3 * cubic) * square));
  } else if constexpr (Phi == Activation::relu) {
    value = x < T{0} ? V{} : x;
    slope = x <= T{0} ? V{} : V{} + T{1};  // 1 at NaN, as torch has it
  } else if constexpr (Phi == Activation::relu2) {
    const V positive = x < T{0} ? V{} : x;
    value = positive * positive;
    slope = T{2} * positive;
  } else {
    static_assert(Phi == Activation::quick_gelu || Phi == Activation::silu);
    constexpr T c = Phi == Activation::quick_gelu ? T(kQuickGelu) : T(1);
    V s, rest;
    sigmoid(c * x, s, rest);
    value = x * s;
    slope = s * (T{1} + c * x * rest);
  }
}

template <class V, class T>
MLP_INLINE V read(const T* from) {
  if constexpr (std::is_same_v<T, Element<V>>) {
    return load<V>(from);
  } else {
    Element<V> v[kWidth<V>];
    for (int64_t i = 0; i < kWidth<V>; ++i) v[i] = static_cast<Element<V>>(from[i]);
    return load<V>(v);
  }
}

template <class T, class V>
MLP_INLINE void write(T* to, V v) {
  if constexpr (std::is_same_v<T, Element<V>>) {
    store(to, v);
  } else {
    for (int64_t i = 0; i < kWidth<V>; ++i) to[i] = static_cast<T>(v[i]);
  }
}

template <class T>
MLP_INLINE T* at(T* x, int64_t i) {
  return x == nullptr ? x : x + i;
}

// The elements of a row that do not fill a vector, in a zero-padded copy.
template <class V, class T>
struct Padded {
  T values[kWidth<V>] = {};
  MLP_INLINE const T* from(const T* x, int64_t count) {
    if (x == nullptr) return nullptr;
    std::copy_n(x, count, values);
    return values;
  }
  MLP_INLINE void to(T* x, int64_t count) const {
    if (x != nullptr) std::copy_n(values, count, x);
  }
};

// What a row computes: phi(z), phi(g) z, or that with the limits and the offset of a gate.
enum class Form { plain, gated, limited };

template <class V>
MLP_INLINE V at_most(V x, Element<V> high) {
  return x > high ? V{} + high : x;
}
template <class V>
MLP_INLINE V within(V x, Element<V> low, Element<V> high) {
  return at_most(x < low ? V{} + low : x, high);
}

// phi(x) and its derivative within the limits of a gate.
template <Activation Phi, class V>
MLP_INLINE void evaluate_within(const Gate<Element<V>>& gate, V x, V& value, V& slope) {
  evaluate<Phi>(within(x, gate.low, gate.high), value, slope);
  slope = (x >= gate.low) & (x <= gate.high) & (value <= gate.highest) ? slope : V{};
  value = at_most(value, gate.highest);
}

// One row, the vectors first and then, by the same code, the elements that are left.
template <Activation Phi, Form F, bool Scaled, class V, class T>
MLP_INLINE void forward_row(const T* z, const T* g, const Wide<T>* before, const Wide<T>* behind,
                            const Gate<Wide<T>>* gate, int64_t n, T* a) {
  constexpr bool Gated = F != Form::plain, Limited = F == Form::limited;
  static_assert(Scaled || !Limited);
  constexpr int64_t width = kWidth<V>;
  const int64_t whole = n / width * width, rest = n - whole;
  T* const last = a + whole;
  Padded<V, T> last_z, last_g, last_a;
  Padded<V, Wide<T>> last_before, last_behind;
  for (int64_t end = whole;; end = width) {
    for (int64_t i = 0; i < end; i += width) {
      V value, slope, argument = read<V>((Gated ? g : z) + i);
      if constexpr (Scaled) argument *= load<V>(before + i);
      if constexpr (Limited) {
        evaluate_within<Phi>(*gate, argument, value, slope);
        value *= within(read<V>(z + i) * load<V>(before + i), -gate->limit, gate->limit) + gate->offset;
      } else {
        evaluate<Phi>(argument, value, slope);
        if constexpr (Gated) value *= read<V>(z + i);
      }
      if constexpr (Scaled) value *= load<V>(behind + i);
      write(a + i, value);
    }
    if (rest == 0 || a == last_a.values) break;
    z = last_z.from(z + whole, rest), g = last_g.from(at(g, whole), rest), a = last_a.values;
    before = last_before.from(at(before, whole), rest), behind = last_behind.from(at(behind, whole), rest);
  }
  if (rest != 0) last_a.to(last, rest);
}

template <Activation Phi, Form F, bool Scaled, class V, class T>
MLP_INLINE void backward_row(const T* da, const T* z, const T* g, const Factors<T>& factors, const Gate<Wide<T>>* gate,
                             const Wide<T>* chain, int64_t n, T* dz, T* dg, T* a) {
  constexpr bool Gated = F != Form::plain, Limited = F == Form::limited;
  static_assert(Scaled || !Limited);
  constexpr int64_t width = kWidth<V>;
  const int64_t whole = n / width * width, rest = n - whole;
  const Wide<T>*before = factors.before, *behind = factors.behind;
  T *const end_dz = dz + whole, *const end_dg = at(dg, whole), *const end_a = at(a, whole);
  Padded<V, T> last_da, last_z, last_g, last_dz, last_dg, last_a;
  Padded<V, Wide<T>> last_before, last_behind, last_chain;
  for (int64_t end = whole;; end = width) {
    for (int64_t i = 0; i < end; i += width) {
      V value, slope, argument = read<V>((Gated ? g : z) + i), upstream = read<V>(da + i);
      if constexpr (Scaled) {
        argument *= load<V>(before + i);
        upstream *= load<V>(behind + i);
      }
      if constexpr (Limited) {
        evaluate_within<Phi>(*gate, argument, value, slope);
      } else {
        evaluate<Phi>(argument, value, slope);
      }
      if constexpr (Scaled) slope *= load<V>(chain + i);
      if constexpr (Limited) {
        const V up = read<V>(z + i) * load<V>(before + i);
        const V input = within(up, -gate->limit, gate->limit) + gate->offset;
        write(dg + i, upstream * input * slope);
        const V through = upstream * value * load<V>(chain + i);
        write(dz + i, (up >= -gate->limit) & (up <= gate->limit) ? through : V{});
        value *= input;
      } else if constexpr (Gated) {
        const V input = read<V>(z + i);
        write(dg + i, upstream * input * slope);
        write(dz + i, upstream * value);
        value *= input;
      } else {
        write(dz + i, upstream * slope);
      }
      if (a != nullptr) write(a + i, value);
    }
    if (rest == 0 || dz == last_dz.values) break;
    da = last_da.from(da + whole, rest), z = last_z.from(z + whole, rest), g = last_g.from(at(g, whole), rest);
    before = last_before.from(at(before, whole), rest), behind = last_behind.from(at(behind, whole), rest);
    chain = last_chain.from(at(chain, whole), rest);
    dz = last_dz.values, dg = last_dg.values, a = a == nullptr ? nullptr : last_a.values;
  }
  if (rest != 0) {
    last_dz.to(end_dz, rest);
    last_dg.to(end_dg, rest);
    last_a.to(end_a, rest);
  }
}

template <Activation Phi, int Bytes, class T>
MLP_INLINE void forward_body(const T* z, const T* g, int64_t rows, int64_t columns, const Factors<T>& factors,
                             const Gate<Wide<T>>* gate, T* a) {
  using V = Vec<Wide<T>, Bytes>;
  const Wide<T>*before = factors.before, *behind = factors.behind;
  if (!factors) {  // one long row
    if (g == nullptr) return forward_row<Phi, Form::plain, false, V>(z, g, before, behind, gate, rows * columns, a);
    return forward_row<Phi, Form::gated, false, V>(z, g, before, behind, gate, rows * columns, a);
  }
  for (int64_t i = 0; i < rows * columns; i += columns) {
    if (g == nullptr) {
      forward_row<Phi, Form::plain, true, V>(z + i, g, before, behind, gate, columns, a + i);
    } else if (gate == nullptr) {
      forward_row<Phi, Form::gated, true, V>(z + i, g + i, before, behind, gate, columns, a + i);
    } else {
      forward_row<Phi, Form::limited, true, V>(z + i, g + i, before, behind, gate, columns, a + i);
    }
  }
}

template <Activation Phi, int Bytes, class T>
MLP_INLINE void backward_body(const T* da, const T* z, const T* g, int64_t rows, int64_t columns,
                              const Factors<T>& factors, const Gate<Wide<T>>* gate, const Wide<T>* chain, T* dz, T* dg,
                              T* a) {
  using V = Vec<Wide<T>, Bytes>;
  const int64_t n = rows * columns;
  if (!factors) {
    if (g == nullptr) return backward_row<Phi, Form::plain, false, V>(da, z, g, factors, gate, chain, n, dz, dg, a);
    return backward_row<Phi, Form::gated, false, V>(da, z, g, factors, gate, chain, n, dz, dg, a);
  }
  for (int64_t i = 0; i < n; i += columns) {
    if (g == nullptr) {
      backward_row<Phi, Form::plain, true, V>(da + i, z + i, g, factors, gate, chain, columns, dz + i, dg, at(a, i));
    } else if (gate == nullptr) {
      backward_row<Phi, Form::gated, true, V>(da + i, z + i, g + i, factors, gate, chain, columns, dz + i, dg + i,
                                              at(a, i));
    } else {
      backward_row<Phi, Form::limited, true, V>(da + i, z + i, g + i, factors, gate, chain, columns, dz + i, dg + i,
                                                at(a, i));
    }
  }
}

template <class T>
MLP_INLINE void scale_columns_body(const T* x, int64_t rows, int64_t columns, const Wide<T>* factor, T* out) {
  for (int64_t i = 0; i < rows * columns; i += columns) {
    for (int64_t j = 0; j < columns; ++j) out[i + j] = static_cast<T>(static_cast<Wide<T>>(x[i + j]) * factor[j]);
  }
}

template <class T>
MLP_INLINE void add_products_body(const T* x, const T* y, int64_t rows, int64_t columns, int64_t stride, double* sum) {
  for (int64_t i = 0; i < rows * stride; i += stride) {
    for (int64_t j = 0; j < columns; ++j) {
      sum[j] += static_cast<double>(static_cast<Wide<T>>(x[i + j])) * static_cast<Wide<T>>(y[i + j]);
    }
  }
}

template <class T>
MLP_INLINE void add_columns_body(const T* x, int64_t rows, int64_t columns, int64_t stride, double* sum) {
  constexpr int64_t block = 4 * kLanes;
  int64_t j = 0;
  for (; j + block <= columns; j += block) {
    Double8 s[4];
    for (int64_t v = 0; v < 4; ++v) s[v] = load<Double8>(sum + j + v * kLanes);
    for (int64_t i = 0; i < rows; ++i) {
      const T* row = x + i * stride + j;
#pragma GCC unroll 4
      for (int64_t v = 0; v < 4; ++v) {
        double wide[kLanes];
        for (int64_t lane = 0; lane < kLanes; ++lane) wide[lane] = static_cast<Wide<T>>(row[v * kLanes + lane]);
        s[v] += load<Double8>(wide);
      }
    }
    for (int64_t v = 0; v < 4; ++v) store(sum + j + v * kLanes, s[v]);
  }
  for (; j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) sum[j] += static_cast<Wide<T>>(x[i * stride + j]);
  }
}

template <class T>
MLP_INLINE void accumulate_body(const T* part, int64_t n, float* sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] += static_cast<float>(part[i]);
}

}  // namespace

// Function multiversioning takes no templates: one function for every activation and element type.
#define MLP_ACTIVATION_ON(Target, Bytes, Name, T)                                                                      \
  Target static void forward_##Name##_##T(const T* z, const T* g, int64_t rows, int64_t columns,                       \
                                          const Factors<T>& factors, const Gate<Wide<T>>* gate, T* a) {                \
    forward_body<Activation::Name, Bytes>(z, g, rows, columns, factors, gate, a);                                      \
  }                                                                                                                    \
  Target static void backward_##Name##_##T(const T* da, const T* z, const T* g, int64_t rows, int64_t columns,         \
                                           const Factors<T>& factors, const Gate<Wide<T>>* gate, const Wide<T>* chain, \
                                           T* dz, T* dg, T* a) {                                                       \
    backward_body<Activation::Name, Bytes>(da, z, g, rows, columns, factors, gate, chain, dz, dg, a);                  \
  }
#define MLP_ACTIVATION(Name, T) MLP_EACH_TARGET(MLP_ACTIVATION_ON, Name, T)

#define MLP_FOR_ACTIVATION(direction, T, arguments)                                                                    \
  switch (phi) {                                                                                                       \
    case Activation::gelu: return direction##_gelu_##T arguments;                                                      \
    case Activation::gelu_tanh: return direction##_gelu_tanh_##T arguments;                                            \
    case Activation::quick_gelu: return direction##_quick_gelu_##T arguments;                                          \
    case Activation::relu: return direction##_relu_##T arguments;                                                      \
    case Activation::relu2: return direction##_relu2_##T arguments;                                                    \
    case Activation::silu: return direction##_silu_##T arguments;                                                      \
  }

#define MLP_ELEMENT_TYPE(T)                                                                                            \
  MLP_ACTIVATION(gelu, T)                                                                                              \
  MLP_ACTIVATION(gelu_tanh, T)                                                                                         \
  MLP_ACTIVATION(quick_gelu, T)                                                                                        \
  MLP_ACTIVATION(relu, T)                                                                                              \
  MLP_ACTIVATION(relu2, T)                                                                                             \
  MLP_ACTIVATION(silu, T)                                                                                              \
  MLP_CLONES static void add_columns_##T(const T* x, int64_t rows, int64_t columns, int64_t stride, double* sum) {     \
    add_columns_body(x, rows, columns, stride, sum);                                                                   \
  }                                                                                                                    \
  MLP_CLONES static void add_products_##T(const T* x, const T* y, int64_t rows, int64_t columns, int64_t stride,       \
                                          double* sum) {                                                               \
    add_products_body(x, y, rows, columns, stride, sum);                                                               \
  }                                                                                                                    \
  MLP_CLONES static void scale_columns_##T(const T* x, int64_t rows, int64_t columns, const Wide<T>* factor, T* out) { \
    scale_columns_body(x, rows, columns, factor, out);                                                                 \
  }                                                                                                                    \
  template <>                                                                                                          \
  void activate<T>(Activation phi, const T* z, const T* g, int64_t rows, int64_t columns, const Factors<T>& factors,   \
                   const Gate<Wide<T>>* gate, T* a) {                                                                  \
MLP_FOR_ACTIVATION(forward, T, (z, g, rows, columns, factors, gate, a))                                                \
  }                                                                                                                    \
  template <>                                                                                                          \
  void activate_backward<T>(Activation phi, const T* da, const T* z, const T* g, int64_t rows, int64_t columns,        \
                            const Factors<T>& factors, const Gate<Wide<T>>* gate, const Wide<T>* chain, T* dz, T* dg,  \
                            T* a) {                                                                                    \
MLP_FOR_ACTIVATION(backward, T, (da, z, g, rows, columns, factors, gate, chain, dz, dg, a))                            \
  }                                                                                                                    \
  template <>                                                                                                          \
  void add_columns<T>(const T* x, int64_t rows, int64_t columns, int64_t stride, double* sum) {                        \
    add_columns_##T(x, rows, columns, stride, sum);                                                                    \
  }                                                                                                                    \
  template <>                                                                                                          \
  void add_products<T>(const T* x, const T* y, int64_t rows, int64_t columns, int64_t stride, double* sum) {           \
    add_products_##T(x, y, rows, columns, stride, sum);                                                                \
  }                                                                                                                    \
  template <>                                                                                                          \
  void scale_columns<T>(const T* x, int64_t rows, int64_t columns, const Wide<T>* factor, T* out) {                    \
    scale_columns_##T(x, rows, columns, factor, out);                                                                  \
  }

#define MLP_ACCUMULATE(T)                                                                                              \
  MLP_CLONES static void accumulate_##T(const T* part, int64_t n, float* sum) { accumulate_body(part, n, sum); }       \
  template <>                                                                                                          \
  void accumulate<T>(const T* part, int64_t n, float* sum) {                                                           \
    accumulate_##T(part, n, sum);                                                                                      \
  }

}  // namespace mlp_fusion
