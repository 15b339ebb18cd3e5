#include "sampled.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace mlp_fusion {
namespace {

// Tokens that are worked on together: their columns lie side by side in a scratch that the second cache holds. A multiple
// of the lanes of a vector, so that what a chunk lacks is zeros.
constexpr int64_t kTokens = 256;
// Entries, and columns to lay side by side, that one thread takes at a time.
constexpr int64_t kEntries = 256, kColumns = 32;
// Entries of one row that share its loads.
constexpr int kShared = 4;
// Multiplications for which threads are woken.
constexpr int64_t kWorthThreads = 1 << 16;

template <class T>
using Lanes = typename Vector<T>::Type;

MLP_INLINE float total(Float8 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
MLP_INLINE double total(Double8 v) { return sum(v); }

// The columns of a matrix that are used, in the order of their places, and the place of every column that is.
struct Places {
  std::vector<int32_t> used, place;

  Places(int64_t columns, const int32_t* of, int64_t count) : place(columns, -1) {
    for (int64_t e = 0; e < count; ++e) {
      if (place[of[e]] < 0) {
        place[of[e]] = static_cast<int32_t>(used.size());
        used.push_back(of[e]);
      }
    }
  }
};

// Of `count` columns of m, the rows [begin, begin + tokens) side by side, each followed by zeros up to kTokens.
template <class T>
void lay_out(const Matrix<T>& m, const int32_t* columns, int64_t count, int64_t begin, int64_t tokens, Wide<T>* out) {
  for (int64_t t = 0; t < tokens; ++t) {
    const T* row = m.data + (begin + t) * m.row_stride;
    for (int64_t c = 0; c < count; ++c) out[c * kTokens + t] = static_cast<Wide<T>>(row[columns[c] * m.column_stride]);
  }
  for (int64_t c = 0; c < count; ++c) std::fill(out + c * kTokens + tokens, out + (c + 1) * kTokens, Wide<T>{0});
}

// What a chunk adds to Entries entries of one row of the product.
template <int Entries, class S>
MLP_INLINE void add_dots(const S* left, const S* right, const int32_t* places, S* out) {
  constexpr int64_t width = kLanes;
  Lanes<S> sums[Entries][2] = {};
  for (int64_t t = 0; t < kTokens; t += 2 * width) {
    const auto first = load<Lanes<S>>(left + t), second = load<Lanes<S>>(left + t + width);
#pragma GCC unroll 4
    for (int i = 0; i < Entries; ++i) {
      const S* column = right + places[i] * kTokens + t;
      sums[i][0] += first * load<Lanes<S>>(column);
      sums[i][1] += second * load<Lanes<S>>(column + width);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < Entries; ++i) out[i] += total(sums[i][0] + sums[i][1]);
}

// What a chunk adds to entries [begin, end).
template <class S>
MLP_INLINE void piece_body(const S* left, const S* right, const int32_t* rows, const int32_t* places, int64_t begin,
                           int64_t end, S* out) {
  for (int64_t e = begin; e < end;) {
    int64_t same = 1;
    while (same < kShared && e + same < end && rows[e + same] == rows[e]) ++same;
    const S* row = left + rows[e] * kTokens;
    if (same == kShared) {
      add_dots<kShared>(row, right, places + e, out + e);
    } else {
      for (int64_t i = 0; i < same; ++i) add_dots<1>(row, right, places + e + i, out + e + i);
    }
    e += same;
  }
}

MLP_CLONES static void piece(const float* left, const float* right, const int32_t* rows, const int32_t* places,
                             int64_t begin, int64_t end, float* out) {
  piece_body(left, right, rows, places, begin, end, out);
}
MLP_CLONES static void piece(const double* left, const double* right, const int32_t* rows, const int32_t* places,
                             int64_t begin, int64_t end, double* out) {
  piece_body(left, right, rows, places, begin, end, out);
}

// The places of entries' rows or columns.
std::vector<int32_t> placed(const Places& places, const int32_t* of, int64_t count) {
  std::vector<int32_t> found(count);
  for (int64_t e = 0; e < count; ++e) found[e] = places.place[of[e]];
  return found;
}

}  // namespace

template <class T>
void sampled_product(const Matrix<T>& g, const Matrix<T>& x, const int32_t* rows, const int32_t* columns, int64_t count,
                     Wide<T>* out) {
  using S = Wide<T>;
  std::fill_n(out, count, S{0});
  const Places of_g(g.columns, rows, count), of_x(x.columns, columns, count);
  const std::vector<int32_t> left_places = placed(of_g, rows, count), right_places = placed(of_x, columns, count);
  const int64_t lefts = of_g.used.size(), rights = of_x.used.size();
  std::vector<S> left(lefts * kTokens), right(rights * kTokens);
  const int64_t left_pieces = (lefts + kColumns - 1) / kColumns, right_pieces = (rights + kColumns - 1) / kColumns;
  const bool worth = count * g.rows > kWorthThreads && torch::stable::get_num_threads() > 1;
  for (int64_t begin = 0; begin < g.rows; begin += kTokens) {
    const int64_t tokens = std::min(kTokens, g.rows - begin);
    for_each_if(worth, left_pieces + right_pieces, [&](int64_t i) {
      const bool of_left = i < left_pieces;
      const int64_t from = (of_left ? i : i - left_pieces) * kColumns;
      const std::vector<int32_t>& used = of_left ? of_g.used : of_x.used;
      const int64_t some = std::min<int64_t>(kColumns, used.size() - from);
      lay_out(of_left ? g : x, used.data() + from, some, begin, tokens, (of_left ? left : right).data() + from * kTokens);
    });
    for_each_if(worth, (count + kEntries - 1) / kEntries, [&](int64_t i) {
      piece(left.data(), right.data(), left_places.data(), right_places.data(), i * kEntries,
            std::min((i + 1) * kEntries, count), out);
    });
  }
}

#define MLP_SAMPLED(T)                                                                                            \
  template void sampled_product(const Matrix<T>&, const Matrix<T>&, const int32_t*, const int32_t*, int64_t, \
                                Wide<T>*);
MLP_SAMPLED(float)
MLP_SAMPLED(double)
MLP_SAMPLED(BFloat16)
MLP_SAMPLED(Half)

}  // namespace mlp_fusion
