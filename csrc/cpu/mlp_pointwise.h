// The pointwise steps of a feed-forward block: activations, their derivatives and sums of columns, each in one pass.
//
// T is double, float, BFloat16 or Half; the last two are computed in float and rounded once on the way out.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace mlp_fusion {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

// As in fusion_kernels/mlp/cpu_backend.py.
enum class Activation : int64_t { kGelu, kGeluTanh, kRelu, kRelu2, kSilu };

// a[i] = phi(z[i]), or phi(g[i]) z[i] unless g is null.
template <class T>
void activate(Activation phi, const T* z, const T* g, int64_t n, T* a);

// The gradients of that for da: dz[i], and dg[i] unless g is null; and a[i] again unless a is null. dz may be da.
template <class T>
void activate_backward(Activation phi, const T* da, const T* z, const T* g, int64_t n, T* dz, T* dg, T* a);

// sum[j] += the sum of column j over `rows` rows that are `stride` apart, in their order.
template <class T>
void add_columns(const T* x, int64_t rows, int64_t columns, int64_t stride, double* sum);

// sum[i] += part[i].
template <class T>
void accumulate(const T* part, int64_t n, float* sum);

}  // namespace mlp_fusion
