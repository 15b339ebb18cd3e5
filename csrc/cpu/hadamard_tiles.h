// The steps of transforms and of Fastfood, each on what a cache holds, by one thread.
#pragma once

#include <cstdint>

#include "hadamard.h"

namespace mlp_fusion {

// Bytes of a contiguous block whose bits are done together, and of a tile of the columns of other bits: half of what the
// second cache has. A tile's rows have two cache lines at least, and it has at most so many bits.
constexpr int64_t kBlockBytes = 65536, kTileBytes = 65536, kRowBytes = 128, kTileBits = 9;
static_assert((kRowBytes << kTileBits) <= kTileBytes);

template <class T>
constexpr int64_t kBlockBits = sizeof(T) == 4 ? 14 : 13;
static_assert((sizeof(float) << kBlockBits<float>) == kBlockBytes);
static_assert((sizeof(double) << kBlockBits<double>) == kBlockBytes);

// The lowest `bits` of n contiguous entries, n a multiple of 2^bits; to may be from.
template <class T>
void transform_block(const T* from, T* to, int64_t n, int64_t bits);

// All `bits` of the index of 2^bits rows, of `width` columns each, a multiple of kRowBytes. In `from` and `to` rows are so
// far apart; to may be from, or `buffer`, which has room for the tile.
template <class T>
void transform_columns(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t bits, int64_t width,
                       T* buffer);

// to (n), n a power of two, = the entries of theta with the signs of B, those that are n apart added up in their order.
template <class T>
void fold_signs(Keys::Pair keys, const T* theta, int64_t d, T* to, int64_t n);

// to[i] = scale times the sign of B times h[i mod n], for i < d and n a power of two.
template <class T>
void unfold_signs(Keys::Pair keys, const T* h, int64_t n, T scale, T* to, int64_t d);

// For `count` <= kDrawn entries from `first` on: where Pi takes them from, and G. There are 2^bits.
constexpr int64_t kDrawn = 256;
template <class T>
void draw_mixing(const Keys& keys, int64_t bits, int64_t first, int64_t count, uint32_t* source, T* weight);

}  // namespace mlp_fusion
