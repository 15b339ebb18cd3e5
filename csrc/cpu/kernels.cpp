#include "kernels.h"

#include <cmath>
#include <limits>

namespace mlp_fusion {
namespace {

// sum[j] (+)= sum over Count rows, in order.
template <int Count, class T>
MLP_INLINE void add_some(const T* const* rows, const double* w, int64_t width, bool first, double* sum) {
  constexpr int64_t lanes = 4, block = 4 * lanes;
  for (int64_t j = 0; j < width; j += block) {
    Double4 sums[4] = {};
    if (!first) {
      for (int64_t v = 0; v < 4; ++v) sums[v] = load<Double4>(sum + j + v * lanes);
    }
#pragma GCC unroll 4
    for (int i = 0; i < Count; ++i) {
#pragma GCC unroll 4
      for (int64_t v = 0; v < 4; ++v) sums[v] += w[i] * load_double4(rows[i] + j + v * lanes);
    }
    for (int64_t v = 0; v < 4; ++v) store(sum + j + v * lanes, sums[v]);
  }
}

template <class T>
MLP_INLINE void add_rows_body(const T* const* rows, const double* w, int64_t count, int64_t width, bool first,
                              double* sum) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) add_some<4>(rows + i, w + i, width, first && i == 0, sum);
  for (; i + 2 <= count; i += 2) add_some<2>(rows + i, w + i, width, first && i == 0, sum);
  for (; i < count; ++i) add_some<1>(rows + i, w + i, width, first && i == 0, sum);
}

template <class T>
MLP_INLINE void scale_row_body(const double* sum, int64_t width, double scale, double shift, T* out) {
  for (int64_t j = 0; j < width; j += kLanes) store_double(out + j, shift + scale * load<Double8>(sum + j));
}

template <class T>
MLP_INLINE void column_minimum_body(const T* v, int64_t stride, int64_t K, int64_t width, T* least) {
  using V = typename Vector<T>::Type;
  for (int64_t j = 0; j < width; ++j) least[j] = v[j];
  int64_t c = 1;
  for (; c + 3 < K; c += 4) {
    const T* row = v + c * stride;
    for (int64_t j = 0; j < width; j += kLanes) {
      const V p = load<V>(row + j), q = load<V>(row + stride + j);
      const V r = load<V>(row + 2 * stride + j), s = load<V>(row + 3 * stride + j);
      const V pq = p < q ? p : q, rs = r < s ? r : s;
      const V four = pq < rs ? pq : rs, old = load<V>(least + j);
      store(least + j, four < old ? four : old);
    }
  }
  for (; c < K; ++c) {
    for (int64_t j = 0; j < width; j += kLanes) {
      const V p = load<V>(v + c * stride + j), old = load<V>(least + j);
      store(least + j, p < old ? p : old);
    }
  }
}

template <class T>
MLP_INLINE Int8 as_int(typename Vector<T>::Mask mask) {
  return __builtin_convertvector(mask, Int8);
}

template <class T>
MLP_INLINE void first_within_body(const T* v, int64_t stride, int64_t K, int64_t width, const T* bound,
                                  int32_t* first) {
  using V = typename Vector<T>::Type;
  for (int64_t c = K - 1; c >= 0; --c) {
    const Int8 id = Int8{} + static_cast<int32_t>(c);
    for (int64_t j = 0; j < width; j += kLanes) {
      const Int8 within = as_int<T>(load<V>(v + c * stride + j) <= load<V>(bound + j));
      store(first + j, within ? id : load<Int8>(first + j));
    }
  }
}

template <class T>
MLP_INLINE void count_within_body(const T* v, int64_t stride, int64_t K, int64_t width, const T* blur, const T* bound,
                                  int32_t* count) {
  using V = typename Vector<T>::Type;
  for (int64_t c = 0; c < K; ++c) {
    for (int64_t j = 0; j < width; j += kLanes) {
      const Int8 within = as_int<T>(load<V>(v + c * stride + j) - blur[c] <= load<V>(bound + j));
      store(count + j, load<Int8>(count + j) - within);  // true is -1
    }
  }
}

template <class T, bool Uniform>
MLP_INLINE void cheapest_entry_body(const Entry<T>& e) {
  using V = typename Vector<T>::Type;
  using M = typename Vector<T>::Mask;
  for (int64_t i = 0; i < e.count; ++i) {
    const int32_t c = e.clusters[i];
    const T* row = e.v + c * e.stride;
    const Int8 id = Int8{} + c;
    for (int64_t j = 0; j < e.width; j += kLanes) {
      const V distance = load<V>(row + j) + load<V>(e.sq + j);
      V cost;
      if constexpr (Uniform) {
        cost = distance * e.factor[c];
      } else {
        const Double8 share = e.W[c] / (e.W[c] + load<Double8>(e.w + j));
        cost = __builtin_convertvector(__builtin_convertvector(distance, Double8) * share, V);
      }
      const V old = load<V>(e.cost + j), second = load<V>(e.second + j);
      const Int8 target = load<Int8>(e.target + j);
      const M other = __builtin_convertvector((load<Int8>(e.labels + j) != id) & (target != id), M);
      const M lower = __builtin_convertvector(id < target, M);
      const M take = other & ((cost < old) | ((cost == old) & lower));
      const V rejected = take ? old : cost;
      const M closer = other & (rejected < second);
      store(e.second + j, closer ? rejected : second);
      store(e.cost + j, take ? cost : old);
      store(e.target + j, as_int<T>(take) ? id : target);
    }
  }
}

template <class T>
MLP_INLINE Double8 seed_distances(const Seeding<T>& state, const T* row, double norm, int64_t j) {
  const Double8 sq = load_double(state.sq + j);
  const Double8 distance = (norm + sq) - 2.0 * load_double(row + j);
  const Double8 zero = {};
  const Double8 kept = distance > state.slack * sq ? distance : zero;
  const Double8 closest = load<Double8>(state.closest + j);
  return kept < closest ? kept : closest;
}

template <int Count, class T>
MLP_INLINE void potentials_of(const Seeding<T>& state, const T* const* rows, const double* norms, double* potential) {
  Double8 totals[Count] = {};
  for (int64_t j = 0; j < state.width; j += kLanes) {
    const Double8 w = load<Double8>(state.w + j);
#pragma GCC unroll 4
    for (int t = 0; t < Count; ++t) totals[t] += w * seed_distances(state, rows[t], norms[t], j);
  }
  for (int t = 0; t < Count; ++t) potential[t] = sum(totals[t]);
}

template <class T>
MLP_INLINE void potentials_body(const Seeding<T>& state, const T* const* rows, const double* norms, int64_t count,
                                double* potential) {
  static_assert(kTrials == 4);
  switch (count) {
    case 4: return potentials_of<4>(state, rows, norms, potential);
    case 3: return potentials_of<3>(state, rows, norms, potential);
    case 2: return potentials_of<2>(state, rows, norms, potential);
    default: return potentials_of<1>(state, rows, norms, potential);
  }
}

template <class T>
MLP_INLINE void take_seed_body(const Seeding<T>& state, const T* row, double norm, double* block) {
  for (int64_t begin = 0, i = 0; begin < state.width; begin += kBlock, ++i) {
    const int64_t end = begin + kBlock < state.width ? begin + kBlock : state.width;
    Double8 mass = {};
    for (int64_t j = begin; j < end; j += kLanes) {
      const Double8 closest = seed_distances(state, row, norm, j);
      store(state.closest + j, closest);
      mass += load<Double8>(state.w + j) * closest;
    }
    block[i] = sum(mass);
  }
}

// Rows of points as given have no padding: the loops below leave a remainder of less than kLanes.
template <class T>
MLP_INLINE double add_row_body(const T* x, double w, int64_t width, double* total, double* largest) {
  Double8 squares = {}, most = {};
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) {
    const Double8 value = load_double(x + j);
    const Double8 magnitude = value < 0.0 ? -value : value;
    store(total + j, load<Double8>(total + j) + w * value);
    squares += value * value;
    most = magnitude > most ? magnitude : most;
  }
  double sum_of_squares = sum(squares), top = *largest;
  for (int l = 0; l < kLanes; ++l) top = most[l] > top ? most[l] : top;
  for (; j < width; ++j) {
    const double value = x[j], magnitude = value < 0 ? -value : value;
    total[j] += w * value;
    sum_of_squares += value * value;
    top = magnitude > top ? magnitude : top;
  }
  *largest = top;
  return sum_of_squares;
}

template <class T>
MLP_INLINE void add_four_body(const T* x, int64_t stride, int64_t width, double* total, double* squares) {
  Double8 own[4] = {};
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) {
    Double8 values[4];
    for (int i = 0; i < 4; ++i) {
      values[i] = load_double(x + i * stride + j);
      own[i] += values[i] * values[i];
    }
    store(total + j, load<Double8>(total + j) + ((values[0] + values[1]) + (values[2] + values[3])));
  }
  for (int i = 0; i < 4; ++i) squares[i] += sum(own[i]);
  for (; j < width; ++j) {
    for (int i = 0; i < 4; ++i) {
      const double value = as_double(x[i * stride + j]);
      squares[i] += value * value;
      total[j] += value;
    }
  }
}

template <class T>
MLP_INLINE double squared_distance_body(const T* x, const double* centre, int64_t width) {
  Double8 squares = {};
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) {
    const Double8 difference = load_double(x + j) - load<Double8>(centre + j);
    squares += difference * difference;
  }
  double total = sum(squares);
  for (; j < width; ++j) total += (x[j] - centre[j]) * (x[j] - centre[j]);
  return total;
}

template <class T>
MLP_INLINE double exact_distance_body(const T* x, const T* centre, double scale, int64_t width) {
  Double8 squares = {};
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) {
    const Double8 difference = (load_double(x + j) - load_double(centre + j)) * scale;
    squares += difference * difference;
  }
  double total = sum(squares);
  for (; j < width; ++j) {
    const double difference = (static_cast<double>(x[j]) - static_cast<double>(centre[j])) * scale;
    total += difference * difference;
  }
  return total;
}

template <class T>
MLP_INLINE void centre_row_body(const T* x, const double* offset, double scale, int64_t width, T* out) {
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes)
    store_double(out + j, (load_double(x + j) - load<Double8>(offset + j)) * scale);
  for (; j < width; ++j) out[j] = static_cast<T>((x[j] - offset[j]) * scale);
}

}  // namespace

MLP_CLONES void add_rows(const float* const* rows, const double* w, int64_t count, int64_t width, bool first,
                         double* sum) {
  add_rows_body(rows, w, count, width, first, sum);
}
MLP_CLONES void add_rows(const double* const* rows, const double* w, int64_t count, int64_t width, bool first,
                         double* sum) {
  add_rows_body(rows, w, count, width, first, sum);
}

MLP_CLONES void add_rows(const uint16_t* const* rows, const double* w, int64_t count, int64_t width, bool first,
                         double* sum) {
  add_rows_body(rows, w, count, width, first, sum);
}

MLP_CLONES void scale_row(const double* sum, int64_t width, double scale, double shift, float* out) {
  scale_row_body(sum, width, scale, shift, out);
}
MLP_CLONES void scale_row(const double* sum, int64_t width, double scale, double shift, double* out) {
  scale_row_body(sum, width, scale, shift, out);
}

MLP_CLONES void column_minimum(const float* v, int64_t stride, int64_t K, int64_t width, float* least) {
  column_minimum_body(v, stride, K, width, least);
}
MLP_CLONES void column_minimum(const double* v, int64_t stride, int64_t K, int64_t width, double* least) {
  column_minimum_body(v, stride, K, width, least);
}

MLP_CLONES void first_within(const float* v, int64_t stride, int64_t K, int64_t width, const float* bound,
                             int32_t* first) {
  first_within_body(v, stride, K, width, bound, first);
}
MLP_CLONES void first_within(const double* v, int64_t stride, int64_t K, int64_t width, const double* bound,
                             int32_t* first) {
  first_within_body(v, stride, K, width, bound, first);
}

MLP_CLONES void count_within(const float* v, int64_t stride, int64_t K, int64_t width, const float* blur,
                             const float* bound, int32_t* count) {
  count_within_body(v, stride, K, width, blur, bound, count);
}
MLP_CLONES void count_within(const double* v, int64_t stride, int64_t K, int64_t width, const double* blur,
                             const double* bound, int32_t* count) {
  count_within_body(v, stride, K, width, blur, bound, count);
}

MLP_CLONES double exact_distance(const float* x, const float* centre, double scale, int64_t width) {
  return exact_distance_body(x, centre, scale, width);
}
MLP_CLONES double exact_distance(const double* x, const double* centre, double scale, int64_t width) {
  return exact_distance_body(x, centre, scale, width);
}

MLP_CLONES void cheapest_entry(const Entry<float>& entry) {
  entry.factor != nullptr ? cheapest_entry_body<float, true>(entry) : cheapest_entry_body<float, false>(entry);
}
MLP_CLONES void cheapest_entry(const Entry<double>& entry) {
  entry.factor != nullptr ? cheapest_entry_body<double, true>(entry) : cheapest_entry_body<double, false>(entry);
}

MLP_CLONES void potentials(const Seeding<float>& state, const float* const* rows, const double* norms, int64_t count,
                           double* potential) {
  potentials_body(state, rows, norms, count, potential);
}
MLP_CLONES void potentials(const Seeding<double>& state, const double* const* rows, const double* norms, int64_t count,
                           double* potential) {
  potentials_body(state, rows, norms, count, potential);
}

MLP_CLONES void take_seed(const Seeding<float>& state, const float* row, double norm, double* block) {
  take_seed_body(state, row, norm, block);
}
MLP_CLONES void take_seed(const Seeding<double>& state, const double* row, double norm, double* block) {
  take_seed_body(state, row, norm, block);
}

MLP_CLONES double add_row(const float* x, double w, int64_t width, double* sum, double* largest) {
  return add_row_body(x, w, width, sum, largest);
}
MLP_CLONES double add_row(const double* x, double w, int64_t width, double* sum, double* largest) {
  return add_row_body(x, w, width, sum, largest);
}

MLP_CLONES void add_four(const float* x, int64_t stride, int64_t width, double* sum, double* squares) {
  add_four_body(x, stride, width, sum, squares);
}
MLP_CLONES void add_four(const uint16_t* x, int64_t stride, int64_t width, double* sum, double* squares) {
  add_four_body(x, stride, width, sum, squares);
}

MLP_CLONES double squared_distance(const float* x, const double* centre, int64_t width) {
  return squared_distance_body(x, centre, width);
}
MLP_CLONES double squared_distance(const double* x, const double* centre, int64_t width) {
  return squared_distance_body(x, centre, width);
}

MLP_CLONES void centre_row(const float* x, const double* offset, double scale, int64_t width, float* out) {
  centre_row_body(x, offset, scale, width, out);
}
MLP_CLONES void centre_row(const double* x, const double* offset, double scale, int64_t width, double* out) {
  centre_row_body(x, offset, scale, width, out);
}

}  // namespace mlp_fusion
