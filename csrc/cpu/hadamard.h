// The Walsh-Hadamard transform, and Fastfood around it: fusion_kernels/hadamard/reference.py has the formulas.
//
// A transform of L = 2^bits entries is a sum and a difference for every bit of the index, the lowest first. All code here
// keeps that order, so that results have the bits of the reference, whatever is done together: hadamard_tiles.h.
#pragma once

#include <cstdint>

namespace mlp_fusion {

// to = the transforms of `rows` rows of 2^bits entries from `from`, all contiguous; to may be from.
template <class T>
void transform_rows(const T* from, T* to, int64_t rows, int64_t bits);

// Pairs of keys, as `Keys.flat` in fusion_kernels/hadamard/types.py has them.
struct Keys {
  static constexpr int64_t kRounds = 4, kCount = 2 * (3 + kRounds);
  struct Pair {
    uint32_t first, second;
  };
  Pair signs, whole, part, rounds[kRounds];
};

// to (size) = P theta, of theta (d).
template <class T>
void fastfood_row(const Keys& keys, const T* theta, int64_t d, T scale, T* to, int64_t size);

// to (d) = P^T y, of y (size).
template <class T>
void fastfood_transposed_row(const Keys& keys, const T* y, int64_t size, T scale, T* to, int64_t d);

// The sum of squares of 2^bits entries of G: high 2^20 + low.
void fastfood_energy(const Keys& keys, int64_t bits, int64_t* high, int64_t* low);

}  // namespace mlp_fusion
