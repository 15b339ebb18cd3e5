#include <algorithm>

#include "hadamard_tiles.h"
#include "simd.h"

namespace mlp_fusion {
namespace {

// As `mixed` in fusion_kernels/hadamard/reference.py.
MLP_INLINE uint32_t mixed(uint32_t x, Keys::Pair keys) {
  x ^= keys.first;
  x = (x ^ x >> 16) * 0x7feb352du;
  x ^= keys.second;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

// How many bits are set; not in the form that GCC takes for an instruction of its own, which vectors have not.
MLP_INLINE uint32_t ones(uint32_t x) {
  x -= x >> 1 & 0x55555555u;
  x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);
  x = (x + (x >> 4)) & 0x0f0f0f0fu;
  x += x >> 8;
  return (x + (x >> 16)) & 0x3fu;
}

MLP_INLINE int32_t gaussian(const Keys& keys, uint32_t i) {
  const uint32_t part = mixed(i, keys.part);
  const uint32_t sum = (ones(mixed(i, keys.whole)) << 16) + (part & 0xffffu) + (part >> 16);
  return static_cast<int32_t>(sum) - ((16 << 16) + 0xffff);
}

template <class T>
MLP_INLINE T signed_by(uint32_t word, T x) {
  return word >> 31 ? -x : x;
}

template <class T>
MLP_INLINE void fold_body(Keys::Pair keys, const T* theta, int64_t d, T* to, int64_t n) {
  const int64_t own = std::min(d, n);
  for (int64_t i = 0; i < own; ++i) to[i] = signed_by(mixed(static_cast<uint32_t>(i), keys), theta[i]);
  std::fill(to + own, to + n, T{0});
  for (int64_t first = n; first < d; first += n) {
    const int64_t some = std::min(n, d - first);
    for (int64_t i = 0; i < some; ++i) {
      to[i] += signed_by(mixed(static_cast<uint32_t>(first + i), keys), theta[first + i]);
    }
  }
}

template <class T>
MLP_INLINE void unfold_body(Keys::Pair keys, const T* h, int64_t n, T scale, T* to, int64_t d) {
  for (int64_t first = 0; first < d; first += n) {
    const int64_t some = std::min(n, d - first);
    for (int64_t i = 0; i < some; ++i) {
      to[first + i] = signed_by(mixed(static_cast<uint32_t>(first + i), keys), scale * h[i]);
    }
  }
}

template <class T>
MLP_INLINE void draw_body(const Keys& keys, int64_t bits, int64_t first, int64_t count, uint32_t* source, T* weight) {
  const uint32_t low = static_cast<uint32_t>((bits + 1) / 2), high = static_cast<uint32_t>(bits / 2);
  const uint32_t low_mask = (1u << low) - 1, high_mask = (1u << high) - 1;
  const Keys own = keys;
  for (int64_t j = 0; j < count; ++j) {
    const uint32_t i = static_cast<uint32_t>(first + j);
    uint32_t right = i & low_mask, left = i >> low;
    right ^= mixed(left, own.rounds[0]) & low_mask;
    left ^= mixed(right, own.rounds[1]) & high_mask;
    right ^= mixed(left, own.rounds[2]) & low_mask;
    left ^= mixed(right, own.rounds[3]) & high_mask;
    source[j] = left << low | right;
  }
  for (int64_t j = 0; j < count; ++j) weight[j] = static_cast<T>(gaussian(own, static_cast<uint32_t>(first + j)));
}

// high 2^20 + low of `count` entries of G from `first` on.
MLP_CLONES void energy_of(const Keys& keys, int64_t first, int64_t count, int64_t* high, int64_t* low) {
  const Keys own = keys;
  int64_t upper = 0, lower = 0;
  for (int64_t i = first; i < first + count; ++i) {
    const int64_t g = gaussian(own, static_cast<uint32_t>(i));
    upper += g * g >> 20;
    lower += g * g & 0xfffff;
  }
  *high = upper;
  *low = lower;
}

}  // namespace

#define MLP_DRAWS(T)                                                                                                   \
  MLP_CLONES static void fold_##T(Keys::Pair keys, const T* theta, int64_t d, T* to, int64_t n) {                      \
    fold_body(keys, theta, d, to, n);                                                                                  \
  }                                                                                                                    \
  MLP_CLONES static void unfold_##T(Keys::Pair keys, const T* h, int64_t n, T scale, T* to, int64_t d) {               \
    unfold_body(keys, h, n, scale, to, d);                                                                             \
  }                                                                                                                    \
  MLP_CLONES static void draw_##T(const Keys& keys, int64_t bits, int64_t first, int64_t count, uint32_t* source,      \
                                  T* weight) {                                                                         \
    draw_body(keys, bits, first, count, source, weight);                                                               \
  }                                                                                                                    \
  template <>                                                                                                          \
  void fold_signs<T>(Keys::Pair keys, const T* theta, int64_t d, T* to, int64_t n) {                                   \
    fold_##T(keys, theta, d, to, n);                                                                                   \
  }                                                                                                                    \
  template <>                                                                                                          \
  void unfold_signs<T>(Keys::Pair keys, const T* h, int64_t n, T scale, T* to, int64_t d) {                            \
    unfold_##T(keys, h, n, scale, to, d);                                                                              \
  }                                                                                                                    \
  template <>                                                                                                          \
  void draw_mixing<T>(const Keys& keys, int64_t bits, int64_t first, int64_t count, uint32_t* source, T* weight) {     \
    draw_##T(keys, bits, first, count, source, weight);                                                                \
  }

MLP_DRAWS(float)
MLP_DRAWS(double)

void fastfood_energy(const Keys& keys, int64_t bits, int64_t* high, int64_t* low) {
  energy_of(keys, 0, int64_t{1} << bits, high, low);
}

}  // namespace mlp_fusion
