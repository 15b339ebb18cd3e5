#include <algorithm>
#include <memory>

#include "hadamard_tiles.h"
#include "parallel.h"

namespace mlp_fusion {
namespace {

// Entries below which waking threads takes longer than the work.
constexpr int64_t kWorthThreads = 32768;
// P^T adds up sources of one place in so many runs at most, whose sums are then added up: by shape alone, not by threads.
constexpr int64_t kRuns = 16;

constexpr int64_t log2_up(int64_t n) {
  int64_t bits = 0;
  while (int64_t{1} << bits < n) ++bits;
  return bits;
}

template <class T>
std::unique_ptr<T[]> uninitialised(int64_t n) {
  return std::unique_ptr<T[]>(new T[n]);
}

// Of a pass over bits [done, done + bits) of `total` entries: tiles of `width` columns.
template <class T>
struct Pass {
  int64_t done, bits, width, tiles;

  Pass(int64_t done, int64_t bits, int64_t total) : done(done), bits(bits) {
    const int64_t room = (kTileBytes / 4 / sizeof(T)) >> bits, least = kRowBytes / sizeof(T);
    width = std::min(int64_t{1} << done, std::max(room, least));
    tiles = (total >> bits) / width;
  }

  // Where a tile begins.
  int64_t first(int64_t tile) const {
    const int64_t across = (int64_t{1} << done) / width;
    return (tile / across << (done + bits)) + tile % across * width;
  }
};

// Passes over the bits from `block` to `bits`, in equal parts; `each` is told which is the last.
template <class T, class Each>
void for_each_pass(int64_t block, int64_t bits, int64_t total, const Each& each) {
  const int64_t passes = (bits - block + kTileBits - 1) / kTileBits;
  int64_t done = block;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t some = (bits - done + passes - pass - 1) / (passes - pass);
    each(Pass<T>(done, some, total), pass + 1 == passes);
    done += some;
  }
}

template <class T>
void columns_in_place(const Pass<T>& pass, T* x) {
  for_each(pass.tiles, [&](int64_t tile) {
    alignas(64) T buffer[kTileBytes / sizeof(T)];
    T* at = x + pass.first(tile);
    transform_columns(at, int64_t{1} << pass.done, at, int64_t{1} << pass.done, pass.bits, pass.width, buffer);
  });
}

// The last pass of one row: what lies beyond `size` is left out, the rest multiplied.
template <class T>
void columns_scaled(const Pass<T>& pass, const T* x, T scale, T* to, int64_t size) {
  const int64_t stride = int64_t{1} << pass.done;
  for_each(pass.tiles, [&](int64_t tile) {
    alignas(64) T buffer[kTileBytes / sizeof(T)];
    const int64_t first = pass.first(tile);
    transform_columns(x + first, stride, buffer, pass.width, pass.bits, pass.width, buffer);
    for (int64_t row = 0; row < int64_t{1} << pass.bits; ++row) {
      const int64_t at = first + row * stride, some = std::min(pass.width, size - at);
      for (int64_t c = 0; c < some; ++c) to[at + c] = scale * buffer[row * pass.width + c];
    }
  });
}

// Where Pi takes kDrawn entries from, and G.
template <class T>
struct Drawn {
  alignas(64) uint32_t source[kDrawn];
  alignas(64) T weight[kDrawn];
};

// to[j] = G u[Pi's source mod 2^u_bits] for n entries from `first` on, of 2^bits.
template <class T>
void mix(const Keys& keys, int64_t bits, const T* u, int64_t u_bits, int64_t first, int64_t n, T* to) {
  const uint32_t mask = (1u << u_bits) - 1;
  Drawn<T> drawn;
  for (int64_t done = 0; done < n; done += kDrawn) {
    const int64_t some = std::min(kDrawn, n - done);
    draw_mixing(keys, bits, first + done, some, drawn.source, drawn.weight);
    for (int64_t j = 0; j < some; ++j) to[done + j] = u[drawn.source[j] & mask] * drawn.weight[j];
  }
}

// to[Pi's source mod 2^u_bits] += G z[j], for the n entries from `first` on.
template <class T>
void unmix(const Keys& keys, int64_t bits, const T* z, int64_t first, int64_t n, T* to, int64_t u_bits) {
  const uint32_t mask = (1u << u_bits) - 1;
  Drawn<T> drawn;
  for (int64_t done = 0; done < n; done += kDrawn) {
    const int64_t some = std::min(kDrawn, n - done);
    draw_mixing(keys, bits, first + done, some, drawn.source, drawn.weight);
    for (int64_t j = 0; j < some; ++j) drawn.weight[j] *= z[first + done + j];
    for (int64_t j = 0; j < some; ++j) to[drawn.source[j] & mask] += drawn.weight[j];
  }
}

}  // namespace

template <class T>
void transform_rows(const T* from, T* to, int64_t rows, int64_t bits) {
  const int64_t block = std::min(bits, kBlockBits<T>), total = rows << bits, n = int64_t{1} << kBlockBits<T>;
  for_each_if(total >= kWorthThreads, (total + n - 1) / n, [&](int64_t i) {
    transform_block(from + i * n, to + i * n, std::min(n, total - i * n), block);
  });
  for_each_pass<T>(block, bits, total, [&](const Pass<T>& pass, bool) { columns_in_place(pass, to); });
}

template <class T>
void fastfood_row(const Keys& keys, const T* theta, int64_t d, T scale, T* to, int64_t size) {
  const int64_t bits = log2_up(size), L = int64_t{1} << bits;
  // H repeats what comes of the entries that are not zero by filling up.
  const int64_t u_bits = std::min(bits, log2_up(d));
  const auto u = uninitialised<T>(int64_t{1} << u_bits);
  fold_signs(keys.signs, theta, d, u.get(), int64_t{1} << u_bits);
  transform_rows<T>(u.get(), u.get(), 1, u_bits);
  const int64_t block = std::min(bits, kBlockBits<T>), n = int64_t{1} << block;
  const auto x = uninitialised<T>(L);
  for_each_if(L >= kWorthThreads, L / n, [&](int64_t i) {
    mix(keys, bits, u.get(), u_bits, i * n, n, x.get() + i * n);
    transform_block(x.get() + i * n, x.get() + i * n, n, block);
  });
  if (block == bits) {
    for (int64_t i = 0; i < size; ++i) to[i] = scale * x[i];
  }
  for_each_pass<T>(block, bits, L, [&](const Pass<T>& pass, bool last) {
    if (last) return columns_scaled(pass, x.get(), scale, to, size);
    columns_in_place(pass, x.get());
  });
}

template <class T>
void fastfood_transposed_row(const Keys& keys, const T* y, int64_t size, T scale, T* to, int64_t d) {
  const int64_t bits = log2_up(size), L = int64_t{1} << bits;
  const int64_t block = std::min(bits, kBlockBits<T>), n = int64_t{1} << block;
  const auto z = uninitialised<T>(L);
  for_each_if(L >= kWorthThreads, L / n, [&](int64_t i) {
    T* at = z.get() + i * n;
    const int64_t there = std::clamp<int64_t>(size - i * n, 0, n);
    std::copy(y + i * n, y + i * n + there, at);
    std::fill(at + there, at + n, T{0});
    if (there > 0) transform_block(at, at, n, block);
  });
  for_each_pass<T>(block, bits, L, [&](const Pass<T>& pass, bool) { columns_in_place(pass, z.get()); });
  // Of H's result only the entries of theta are wanted, to which those that are 2^u_bits apart contribute alike.
  const int64_t u_bits = std::min(bits, log2_up(d)), U = int64_t{1} << u_bits;
  const int64_t runs = std::min(kRuns, L / U), run = L / runs;
  const auto u = uninitialised<T>(runs * U);
  for_each_if(L >= kWorthThreads, runs, [&](int64_t i) {
    std::fill(u.get() + i * U, u.get() + (i + 1) * U, T{0});
    unmix(keys, bits, z.get(), i * run, run, u.get() + i * U, u_bits);
  });
  for (int64_t i = 1; i < runs; ++i) {
    for (int64_t j = 0; j < U; ++j) u[j] += u[i * U + j];
  }
  transform_rows<T>(u.get(), u.get(), 1, u_bits);
  unfold_signs(keys.signs, u.get(), U, scale, to, d);
}

template void transform_rows<float>(const float*, float*, int64_t, int64_t);
template void transform_rows<double>(const double*, double*, int64_t, int64_t);
template void fastfood_row<float>(const Keys&, const float*, int64_t, float, float*, int64_t);
template void fastfood_row<double>(const Keys&, const double*, int64_t, double, double*, int64_t);
template void fastfood_transposed_row<float>(const Keys&, const float*, int64_t, float, float*, int64_t);
template void fastfood_transposed_row<double>(const Keys&, const double*, int64_t, double, double*, int64_t);

}  // namespace mlp_fusion
