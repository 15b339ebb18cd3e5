// The pointwise steps of a feed-forward block: activations, their derivatives and sums of columns, each in one pass.
//
// T is double, float, BFloat16 or Half; the last two are computed in float and rounded once on the way out.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "../activation.h"
#include "../gate.h"

namespace mlp_fusion {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

// What T is computed in.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// What multiplies every column before and behind phi: both are there, or neither.
template <class T>
struct Factors {
  const Wide<T>*before = nullptr, *behind = nullptr;
  explicit operator bool() const { return before != nullptr; }
};

// a = behind phi(before z), or behind phi(before g) z unless g is null; all (rows, columns), contiguous. With a gate, whose
// limits and offset are then computed, there are factors, and z is multiplied by `before` as well.
template <class T>
void activate(Activation phi, const T* z, const T* g, int64_t rows, int64_t columns, const Factors<T>& factors,
              const Gate<Wide<T>>* gate, T* a);

// The gradients of that for da: dz, and dg unless g is null; and a without its factor behind again unless a is null. dz
// may be da. Where there are factors, the gradients of what `before` multiplies are multiplied by those of `chain`:
// `before`, or ones for what d before is made of.
template <class T>
void activate_backward(Activation phi, const T* da, const T* z, const T* g, int64_t rows, int64_t columns,
                       const Factors<T>& factors, const Gate<Wide<T>>* gate, const Wide<T>* chain, T* dz, T* dg, T* a);

// out = x with every column times its factor; both (rows, columns), contiguous. out may be x.
template <class T>
void scale_columns(const T* x, int64_t rows, int64_t columns, const Wide<T>* factor, T* out);

// sum[j] += the sum over `rows` rows, `stride` apart, of x[., j] y[., j], in their order.
template <class T>
void add_products(const T* x, const T* y, int64_t rows, int64_t columns, int64_t stride, double* sum);

// sum[j] += the sum of column j over `rows` rows that are `stride` apart, in their order.
template <class T>
void add_columns(const T* x, int64_t rows, int64_t columns, int64_t stride, double* sum);

// sum[i] += part[i].
template <class T>
void accumulate(const T* part, int64_t n, float* sum);

}  // namespace mlp_fusion
