// The kernels of csrc/cuda, run by one thread of the host: their index arithmetic, their order of loads, products and sums,
// and their stores are the very functions that they call. Here are shared memory, the copies into it and what ldmatrix and
// mma.sync do with the registers of 32 lanes, by the PTX manual's tables. What the barriers and the asynchronous copies are
// for, that steps of many threads overlap, is not emulated.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../../csrc/cuda/gram.h"
#include "../../csrc/cuda/strip.h"

namespace mlp_fusion::cuda {
namespace {

using namespace tensor_cores;

// The sum of a product of 16 columns and what is there, cut off behind 24 bits as tensor cores may.
float truncated(double sum) {
  const float nearest = static_cast<float>(sum);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
}

// What tensor cores read of 32 bits: cut off behind 11 significant bits.
float from_tf32(uint32_t bits) {
  bits &= ~uint32_t{0x1fff};
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <int kPlanes, int kWords>
struct Warp {
  struct Fragment {
    uint32_t r[32][4];
  };
  struct Sum {
    float e[32][4];
  };

  const uint16_t* stage;
  int warp;

  // Four 8 x 8 matrices, whose rows are where lanes 0-7, 8-15, 16-23 and 24-31 point to.
  Fragment load(const int (&offset)[32]) const {
    Fragment to;
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        const uint16_t* const from = stage + offset[8 * matrix + lane / 4] + lane % 4 * 2;
        to.r[lane][matrix] = from[0] | static_cast<uint32_t>(from[1]) << 16;
      }
    }
    return to;
  }
  Fragment left(int plane, int rows, int step) const {
    int offset[32];
    for (int lane = 0; lane < 32; ++lane) {
      const int first = shared_offset(left_fragment(lane, warp_row(warp)));
      offset[lane] = plane_offset(kPlanes, 0, plane) + fragment_offset(first, rows, step);
    }
    return load(offset);
  }
  Fragment right(int plane, int rows, int step) const {
    int offset[32];
    for (int lane = 0; lane < 32; ++lane) {
      const int first = shared_offset(right_fragment(lane, warp_column(warp)));
      offset[lane] = plane_offset(kPlanes, 1, plane) + fragment_offset(first, rows, step);
    }
    return load(offset);
  }
  // With group = lane / 4 and t = lane % 4, a lane's registers of C hold columns 2t, 2t + 1 of row group, then of row
  // group + 8. m16n8k16: those of A hold columns 2t, 2t + 1 of rows group and group + 8, then columns 2t + 8, 2t + 9 of the
  // same; of B rows (of k) 2t, 2t + 1, then 2t + 8, 2t + 9, of column group. m16n8k8: those of A hold column t of rows group
  // and group + 8, then column t + 4 of the same; of B rows t, then t + 4, of column group; the low 13 bits do not count.
  void multiply_add(Sum& c, const Fragment& a, const Fragment& b, int half) const {
    constexpr int kColumns = 16 / kWords;
    float left[16][kColumns], right[kColumns][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, t = lane % 4;
      if constexpr (kWords == 2) {
        for (int r = 0; r < 4; ++r) left[group + 8 * (r % 2)][t + 4 * (r / 2)] = from_tf32(a.r[lane][r]);
        for (int r = 0; r < 2; ++r) right[t + 4 * r][group] = from_tf32(b.r[lane][2 * half + r]);
      } else {
        for (int i = 0; i < 2; ++i) {
          const int shift = 16 * i;
          for (int r = 0; r < 4; ++r) {
            left[group + 8 * (r % 2)][2 * t + i + 8 * (r / 2)] = from_bfloat16(a.r[lane][r] >> shift & 0xffff);
          }
          for (int r = 0; r < 2; ++r) {
            right[2 * t + i + 8 * r][group] = from_bfloat16(b.r[lane][2 * half + r] >> shift & 0xffff);
          }
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int e = 0; e < 4; ++e) {
        const int row = lane / 4 + 8 * (e / 2), column = lane % 4 * 2 + e % 2;
        double sum = c.e[lane][e];
        for (int k = 0; k < kColumns; ++k) sum += static_cast<double>(left[row][k]) * right[k][column];
        c.e[lane][e] = truncated(sum);
      }
    }
  }
  void add(Sum& sum, const Sum& part) const {
    for (int lane = 0; lane < 32; ++lane) {
      for (int e = 0; e < 4; ++e) sum.e[lane][e] += part.e[lane][e];
    }
  }
};

template <int kPlanes, int kWords>
void tensor_core_tile(const Gram<float>& gram, int64_t block) {
  using Sum = typename Warp<kPlanes, kWords>::Sum;
  struct Accumulator {
    Sum sum[kDown][kAcross];
  };
  constexpr int kStages = stages(kPlanes), kWarps = kThreads / 32;
  const Tile tile = tile_of(gram, kEdge, block);
  const int64_t row = tile.row * kEdge, column = tile.column * kEdge, width = gram.columns.all() * kWords;
  const auto *left = static_cast<const uint16_t*>(gram.left), *right = static_cast<const uint16_t*>(gram.right);
  std::vector<uint16_t> ring(kStages * stage_elements(kPlanes), 0x7fff);  // NaN
  const int steps = static_cast<int>(width / kDepth);
  const auto stage_of = [&](int step) { return ring.data() + step % kStages * stage_elements(kPlanes); };
  const auto fetch = [&](int step) {
    if (step >= steps) return;
    for (int thread = 0; thread < kThreads; ++thread) {
      for (int p = 0; p < kPlanes; ++p) {
        for (int copy = 0; copy < kCopies; ++copy) {
          const Piece at = copied(thread, copy);
          const int64_t begin = step * kDepth + at.piece * kPiece;
          const uint16_t* const from_left = left + p * gram.left_plane * kWords + least(row + at.row, gram.n1 - 1) * width + begin;
          const uint16_t* const from_right =
              right + p * gram.right_plane * kWords + least(column + at.row, gram.n2 - 1) * width + begin;
          std::copy_n(from_left, kPiece, stage_of(step) + plane_offset(kPlanes, 0, p) + shared_offset(at));
          std::copy_n(from_right, kPiece, stage_of(step) + plane_offset(kPlanes, 1, p) + shared_offset(at));
        }
      }
    }
  };
  std::vector<Accumulator> inputs(kWarps), total(kWarps);
  const int behind_inputs = static_cast<int>(gram.columns.inputs * kWords / kDepth);
  const int behind_slopes = behind_inputs + static_cast<int>(gram.columns.slopes() * kWords / kDepth);
  const auto combine = [&] {
    for (int warp = 0; warp < kWarps; ++warp) {
      for (int i = 0; i < kDown * kAcross * 128; ++i) {
        const int product = i / 128, lane = i / 4 % 32, e = i % 4;
        total[warp].sum[product / kAcross][product % kAcross].e[lane][e] *=
            inputs[warp].sum[product / kAcross][product % kAcross].e[lane][e] + gram.bias;
      }
    }
  };
  for (int step = 0; step < kStages - 1; ++step) fetch(step);
  for (int step = 0; step <= steps; ++step) {
    if (step == behind_slopes) combine();
    if (step == steps) break;
    fetch(step + kStages - 1);
    for (int warp = 0; warp < kWarps; ++warp) {
      multiply_stage<kPlanes>(Warp<kPlanes, kWords>{stage_of(step), warp}, (step < behind_inputs ? inputs : total)[warp].sum);
    }
  }
  for (int thread = 0; thread < kThreads; ++thread) {
    for (int down = 0; down < kDown; ++down) {
      for (int across = 0; across < kAcross; ++across) {
        for (int e = 0; e < 4; ++e) {
          const Tile at = result(thread / 32, thread % 32, down, across, e);
          const float value = total[thread / 32].sum[down][across].e[thread % 32][e];
          store(gram, is_inner(gram, tile, kEdge), row + at.row, column + at.column, value);
        }
      }
    }
  }
}

template <class T>
void plain_tile(const Gram<T>& gram, int64_t block) {
  using S = plain_cores::Shape<T>;
  using namespace plain_cores;
  const Tile tile = tile_of(gram, S::kEdge, block);
  const int64_t row = tile.row * S::kEdge, column = tile.column * S::kEdge, width = gram.columns.all();
  const int64_t behind_inputs = gram.columns.inputs / kSlice;
  const int64_t behind_slopes = behind_inputs + gram.columns.slopes() / kSlice;
  std::vector<T> inputs(S::kEdge * S::kEdge), total(S::kEdge * S::kEdge);
  for (int64_t slice = 0; slice <= width / kSlice; ++slice) {
    if (slice == behind_slopes) {
      for (size_t i = 0; i < total.size(); ++i) total[i] *= inputs[i] + gram.bias;
    }
    if (slice == width / kSlice) break;
    std::vector<T> shared(2 * kSlice * S::kPitch, std::numeric_limits<T>::quiet_NaN());
    for (int thread = 0; thread < plain_cores::kThreads; ++thread) {
      for (int copy = 0; copy < S::kCopies; ++copy) {
        const Piece at = plain_cores::copied<T>(thread, copy);
        for (int k = 0; k < S::kGroup; ++k) {
          const int64_t from = slice * kSlice + at.piece * S::kGroup + k;
          const int to = (at.piece * S::kGroup + k) * S::kPitch + at.row;
          shared[to] = static_cast<const T*>(gram.left)[least(row + at.row, gram.n1 - 1) * width + from];
          shared[kSlice * S::kPitch + to] =
              static_cast<const T*>(gram.right)[least(column + at.row, gram.n2 - 1) * width + from];
        }
      }
    }
    std::vector<T>& sum = slice < behind_inputs ? inputs : total;
    for (int thread = 0; thread < plain_cores::kThreads; ++thread) {
      for (int i = 0; i < S::kOwn; ++i) {
        for (int j = 0; j < S::kOwn; ++j) {
          const int down = own<T>(thread / 16, i), across = own<T>(thread % 16, j);
          T part = 0;
          for (int k = 0; k < kSlice; ++k) {
            part = std::fma(shared[k * S::kPitch + down], shared[(kSlice + k) * S::kPitch + across], part);
          }
          sum[down * S::kEdge + across] += part;
        }
      }
    }
  }
  for (int thread = 0; thread < plain_cores::kThreads; ++thread) {
    for (int i = 0; i < S::kOwn; ++i) {
      for (int j = 0; j < S::kOwn; ++j) {
        const int down = own<T>(thread / 16, i), across = own<T>(thread % 16, j);
        store(gram, is_inner(gram, tile, S::kEdge), row + down, column + across, total[down * S::kEdge + across]);
      }
    }
  }
}

template <class T>
void operand(const Factors<T>& factors, Format format, void* to) {
  const int64_t columns = factors.columns.all();
  for (int64_t i = 0; i < factors.n * columns; ++i) {
    const T value = operand_value(factors, i / columns, i % columns);
    if (format == Format::plain) {
      static_cast<T*>(to)[i] = value;
    } else if (format == Format::tf32_twice) {
      const float single = static_cast<float>(value), high = to_tf32(single);
      static_cast<float*>(to)[i] = high;
      static_cast<float*>(to)[factors.n * columns + i] = to_tf32(left_of(single, high));
    } else {
      const uint16_t high = to_bfloat16(static_cast<float>(value));
      static_cast<uint16_t*>(to)[i] = high;
      if (format == Format::bfloat16_twice) {
        static_cast<uint16_t*>(to)[factors.n * columns + i] =
            to_bfloat16(left_of(static_cast<float>(value), from_bfloat16(high)));
      }
    }
  }
}

template <class T>
void run(const Gram<T>& gram, Format format) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (format != Format::plain) {
      const auto tile = format == Format::bfloat16     ? tensor_core_tile<1, 1>
                        : format == Format::tf32_twice ? tensor_core_tile<2, 2>
                                                       : tensor_core_tile<2, 1>;
      for (int64_t block = 0; block < tiles_of(gram, kEdge); ++block) tile(gram, block);
      return;
    }
  }
  for (int64_t block = 0; block < tiles_of(gram, plain_cores::Shape<T>::kEdge); ++block) plain_tile(gram, block);
}

// The sum of a block's threads, by halves.
double added_up(std::vector<double> values) {
  for (size_t half = values.size() / 2; half > 0; half /= 2) {
    for (size_t i = 0; i < half; ++i) values[i] += values[i + half];
  }
  return values[0];
}

template <class T>
void strip_sums(const Strip<T>& strip) {
  for (int64_t group = 0; group < strips::groups(strip.columns); ++group) {
    std::vector<std::vector<double>> values(4, std::vector<double>(strips::kThreads));
    for (int thread = 0; thread < strips::kThreads; ++thread) {
      const int64_t column = group * strips::kThreads + thread;
      const auto own = column < strip.columns ? strips::column_products(strip, column) : strips::Products{};
      for (int k = 0; k < 4; ++k) values[k][thread] = own.value[k];
    }
    for (int k = 0; k < 4; ++k) strip.sums[group * 4 + k] += added_up(values[k]);
  }
  for (int64_t row = 0; row < strip.rows; ++row) {
    std::vector<double> a(strips::kThreads), b(strips::kThreads);
    for (int thread = 0; thread < strips::kThreads; ++thread) {
      const auto own = strips::row_margins(strip, row, thread);
      a[thread] = own.a;
      b[thread] = own.b;
    }
    strip.of_rows[row] += added_up(a);
    strip.of_rows[strip.row_stride + row] += added_up(b);
  }
}

}  // namespace
}  // namespace mlp_fusion::cuda

using namespace mlp_fusion;
using namespace mlp_fusion::cuda;

// The table of csrc/activation.h, by number.
extern "C" int activation_count() { return static_cast<int>(kActivations.size()); }
extern "C" const char* activation_name(int number) { return kActivations[number].data(); }
extern "C" int activation_number(const char* name) {
  const auto found = activation_named(name);
  return found ? static_cast<int>(*found) : -1;
}

// `tensors`: x, z, g, shrink, of_hidden, of_in, of_gate; `sizes`: n, d, h and the columns.
#define MLP_ENTRY(T, name)                                                                                             \
  extern "C" void operand_##name(const T* const* tensors, const int64_t* sizes, const char* activation,                \
                                 const double* limit, const char* clamp, double up_offset, bool signs, Format format,  \
                                 void* to) {                                                           \
    const Factors<T> factors{tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], tensors[5], tensors[6],       \
                             sizes[0], sizes[1], sizes[2], {sizes[3], sizes[4], sizes[5], sizes[6]},                   \
                             *activation_named(activation),                                                            \
                             *gate_of<T, T>(limit == nullptr ? std::nullopt : std::optional(*limit), clamp, up_offset), \
                             signs};                                                                                   \
    operand(factors, format, to);                                                                                      \
  }                                                                                                                    \
  extern "C" void tiles_##name(const void* left, const void* right, const int64_t* sizes, double bias,                 \
                               double constant, bool accumulate, bool symmetric, Format format, T* out) {              \
    const Gram<T> gram{left, right, sizes[6], sizes[7], sizes[0], sizes[1], {sizes[2], sizes[3], 0, sizes[4]},         \
                       T(bias), T(constant), accumulate, symmetric, out, sizes[5]};                                    \
    run(gram, format);                                                                                                 \
  }                                                                                                                    \
  extern "C" void strip_##name(const T* a, const T* b, const int64_t* sizes, bool symmetric, double* sums,             \
                               double* rows, double* columns) {                                                        \
    strip_sums(Strip<T>{a, b, sizes[0], sizes[1], sizes[1], sizes[2], symmetric, sums, rows, columns, sizes[3],        \
                        sizes[4]});                                                                                    \
  }
MLP_ENTRY(float, float)
MLP_ENTRY(double, double)

// Tile number `index`, its row then its column.
extern "C" void tile_place(int64_t index, int64_t rows, int64_t columns, bool symmetric, int64_t* place) {
  const Tile tile = tile_at(index, rows, columns, symmetric);
  place[0] = tile.row;
  place[1] = tile.column;
}

// How many of the 8 pieces of 16 bytes that each phase of a warp's accesses touches at a time share a bank with another,
// over all copies into a stage and all fragments read from it.
extern "C" int bank_conflicts() {
  int conflicts = 0;
  const auto count = [&](const int (&offsets)[8]) {
    uint32_t seen = 0;
    for (const int offset : offsets) {
      const uint32_t bank = 1u << (offset / kPiece % 8);
      conflicts += (seen & bank) != 0;
      seen |= bank;
    }
  };
  int offsets[8];
  for (int thread = 0; thread < tensor_cores::kThreads; thread += 8) {
    for (int copy = 0; copy < kCopies; ++copy) {
      for (int i = 0; i < 8; ++i) offsets[i] = shared_offset(tensor_cores::copied(thread + i, copy));
      count(offsets);
    }
  }
  for (int lane = 0; lane < 32; lane += 8) {
    for (int row = 0; row < kEdge; row += 16) {
      for (int step = 0; step < kDepth / 16; ++step) {
        for (int i = 0; i < 8; ++i) offsets[i] = fragment_offset(shared_offset(left_fragment(lane + i, 0)), row, step);
        count(offsets);
        for (int i = 0; i < 8; ++i) offsets[i] = fragment_offset(shared_offset(right_fragment(lane + i, 0)), row, step);
        count(offsets);
      }
    }
  }
  return conflicts;
}

extern "C" int shared_memory(int planes) { return shared_bytes(planes); }
