#include "hadamard.h"

#include <algorithm>
#include <utility>

#include "hadamard_tiles.h"
#include "simd.h"

namespace mlp_fusion {
namespace {

// Vectors are as wide as the registers of the instruction set that a function is compiled for.
template <class T, int Bytes>
struct VectorOf {
  typedef T Type __attribute__((vector_size(Bytes)));
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Index __attribute__((vector_size(Bytes)));
  static constexpr int kLanes = Bytes / sizeof(T);
};

constexpr int log2_of(int n) { return n == 1 ? 0 : 1 + log2_of(n / 2); }

// The entry at lane ^ Stride, plus or minus every lane's own.
template <class T, int Bytes, int Stride, int... Lane>
MLP_INLINE typename VectorOf<T, Bytes>::Type cross(typename VectorOf<T, Bytes>::Type v,
                                                   std::integer_sequence<int, Lane...>) {
  using Vector = VectorOf<T, Bytes>;
  constexpr typename Vector::Type sign = {static_cast<T>(Lane & Stride ? -1 : 1)...};
#if defined(__clang__)
  const typename Vector::Type other = __builtin_shufflevector(v, v, (Lane ^ Stride)...);
#else
  constexpr typename Vector::Index partner = {(Lane ^ Stride)...};
  const typename Vector::Type other = __builtin_shuffle(v, partner);
#endif
  return other + v * sign;  // exact products: it does not matter whether they are rounded
}

// The lowest `Bits` of the index, within a vector.
template <class T, int Bytes, int Bits>
MLP_INLINE typename VectorOf<T, Bytes>::Type within(typename VectorOf<T, Bytes>::Type v) {
  if constexpr (Bits > 0) {
    v = within<T, Bytes, Bits - 1>(v);
    v = cross<T, Bytes, 1 << (Bits - 1)>(v, std::make_integer_sequence<int, VectorOf<T, Bytes>::kLanes>{});
  }
  return v;
}

// `Bits` bits among as many vectors.
template <int Bits, class V>
MLP_INLINE void among(V* v) {
#pragma GCC unroll 3
  for (int bit = 0; bit < Bits; ++bit) {
#pragma GCC unroll 8
    for (int i = 0; i < 1 << Bits; ++i) {
      if (i >> bit & 1) continue;
      const V a = v[i], b = v[i | 1 << bit];
      v[i] = a + b;
      v[i | 1 << bit] = a - b;
    }
  }
}

// The lowest `Inside` bits within vectors, and `Bits` from that of `stride` on, a multiple of the lanes, among them.
template <int Inside, int Bits, int Bytes, class T>
MLP_INLINE void block_sweep(const T* from, T* to, int64_t n, int64_t stride) {
  using V = typename VectorOf<T, Bytes>::Type;
  constexpr int64_t lanes = VectorOf<T, Bytes>::kLanes;
  for (int64_t base = 0; base < n; base += stride << Bits) {
    for (int64_t j = base; j < base + stride; j += lanes) {
      V v[1 << Bits];
#pragma GCC unroll 8
      for (int64_t i = 0; i < 1 << Bits; ++i) v[i] = within<T, Bytes, Inside>(load<V>(from + j + i * stride));
      among<Bits>(v);
#pragma GCC unroll 8
      for (int64_t i = 0; i < 1 << Bits; ++i) store(to + j + i * stride, v[i]);
    }
  }
}

// Fewer bits than a vector has: several rows are in one, and the last may be cut short.
template <int Inside, int Bytes, class T>
MLP_INLINE void short_rows(const T* from, T* to, int64_t n) {
  using V = typename VectorOf<T, Bytes>::Type;
  constexpr int64_t lanes = VectorOf<T, Bytes>::kLanes;
  const int64_t whole = n / lanes * lanes;
  block_sweep<Inside, 0, Bytes>(from, to, whole, lanes);
  if (whole == n) return;
  T rest[lanes] = {};
  std::copy(from + whole, from + n, rest);
  store(rest, within<T, Bytes, Inside>(load<V>(rest)));
  std::copy(rest, rest + (n - whole), to + whole);
}

template <int Bytes, class T>
MLP_INLINE void block_body(const T* from, T* to, int64_t n, int64_t bits) {
  constexpr int64_t lanes = VectorOf<T, Bytes>::kLanes;
  constexpr int inside = log2_of(lanes);
  if (bits < inside) {
    switch (bits) {
      case 0: return short_rows<0, Bytes>(from, to, n);
      case 1: return short_rows<1, Bytes>(from, to, n);
      case 2: return short_rows<std::min(2, inside), Bytes>(from, to, n);
      default: return short_rows<std::min(3, inside), Bytes>(from, to, n);
    }
  }
  int64_t done = inside + std::min<int64_t>(3, bits - inside);
  switch (done - inside) {
    case 0: block_sweep<inside, 0, Bytes>(from, to, n, lanes); break;
    case 1: block_sweep<inside, 1, Bytes>(from, to, n, lanes); break;
    case 2: block_sweep<inside, 2, Bytes>(from, to, n, lanes); break;
    default: block_sweep<inside, 3, Bytes>(from, to, n, lanes);
  }
  while (done < bits) {
    const int64_t some = std::min<int64_t>(3, bits - done);
    switch (some) {
      case 1: block_sweep<0, 1, Bytes>(to, to, n, int64_t{1} << done); break;
      case 2: block_sweep<0, 2, Bytes>(to, to, n, int64_t{1} << done); break;
      default: block_sweep<0, 3, Bytes>(to, to, n, int64_t{1} << done);
    }
    done += some;
  }
}

// `Bits` bits of the index of 2^bits rows, from bit `done` on.
template <int Bits, int Bytes, class T>
MLP_INLINE void column_sweep(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t bits, int64_t done,
                             int64_t width) {
  using V = typename VectorOf<T, Bytes>::Type;
  constexpr int64_t lanes = VectorOf<T, Bytes>::kLanes;
  const int64_t low = int64_t{1} << done;
  for (int64_t group = 0; group < int64_t{1} << (bits - Bits); ++group) {
    const int64_t row = (group / low << (done + Bits)) + group % low;
    for (int64_t c = 0; c < width; c += lanes) {
      V v[1 << Bits];
#pragma GCC unroll 8
      for (int64_t i = 0; i < 1 << Bits; ++i) v[i] = load<V>(from + (row + (i << done)) * from_stride + c);
      among<Bits>(v);
#pragma GCC unroll 8
      for (int64_t i = 0; i < 1 << Bits; ++i) store(to + (row + (i << done)) * to_stride + c, v[i]);
    }
  }
}

template <int Bytes, class T>
MLP_INLINE void columns_body(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t bits, int64_t width,
                             T* buffer) {
  const int64_t sweeps = (bits + 2) / 3;
  for (int64_t sweep = 0, done = 0; sweep < sweeps; ++sweep) {
    const int64_t some = (bits - done + sweeps - sweep - 1) / (sweeps - sweep);
    T* target = sweep + 1 < sweeps ? buffer : to;
    const int64_t target_stride = sweep + 1 < sweeps ? width : to_stride;
    switch (some) {
      case 1: column_sweep<1, Bytes>(from, from_stride, target, target_stride, bits, done, width); break;
      case 2: column_sweep<2, Bytes>(from, from_stride, target, target_stride, bits, done, width); break;
      default: column_sweep<3, Bytes>(from, from_stride, target, target_stride, bits, done, width);
    }
    from = target, from_stride = target_stride;
    done += some;
  }
}

}  // namespace

// Function multiversioning takes no templates.
#define MLP_HADAMARD_ON(Target, Bytes, T)                                                                              \
  Target static void block_##T(const T* from, T* to, int64_t n, int64_t bits) {                                        \
    block_body<Bytes>(from, to, n, bits);                                                                              \
  }                                                                                                                    \
  Target static void columns_##T(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t bits,           \
                                 int64_t width, T* buffer) {                                                           \
    columns_body<Bytes>(from, from_stride, to, to_stride, bits, width, buffer);                                        \
  }
#define MLP_HADAMARD(T)                                                                                                \
  MLP_EACH_TARGET(MLP_HADAMARD_ON, T)                                                                                  \
  template <>                                                                                                          \
  void transform_block<T>(const T* from, T* to, int64_t n, int64_t bits) {                                             \
    block_##T(from, to, n, bits);                                                                                      \
  }                                                                                                                    \
  template <>                                                                                                          \
  void transform_columns<T>(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t bits,                \
                            int64_t width, T* buffer) {                                                                \
    columns_##T(from, from_stride, to, to_stride, bits, width, buffer);                                                \
  }

MLP_HADAMARD(float)
MLP_HADAMARD(double)

}  // namespace mlp_fusion
