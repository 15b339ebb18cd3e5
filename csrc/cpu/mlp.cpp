#include "mlp.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <type_traits>
#include <vector>

#include "gemm.h"
#include "mlp_few.h"
#include "mlp_tensors.h"
#include "parallel.h"

namespace mlp_fusion {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements of a thread's share of a chunk's hidden tile: in float 256 KiB, so that the few tiles of a step fit the caches
// of a core and add little to what a training step holds. And its fewest rows, for which a product still runs at full
// speed, and its most, so that sums over many tokens are sums of sums.
constexpr int64_t kTileElements = 1 << 16;
constexpr int64_t kLeastRows = 512, kMostRows = 1024;
// Elements of a pointwise step that one thread takes at a time.
constexpr int64_t kGrain = 1 << 14;

template <class T>
constexpr ScalarType kType = std::is_same_v<T, double>     ? ScalarType::Double
                             : std::is_same_v<T, BFloat16> ? ScalarType::BFloat16
                             : std::is_same_v<T, Half>     ? ScalarType::Half
                                                           : ScalarType::Float;

// Memory that the allocator of PyTorch aligns for vectors, released with the object.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n) {
    if (n == 0) return;
    tensor_ = allocate<1>({n}, kType<T>);
    data_ = static_cast<T*>(tensor_.data_ptr());
  }
  T* data() const { return data_; }

 private:
  Tensor tensor_;
  T* data_ = nullptr;
};

template <class T>
Tensor view(const Matrix<T>& m) {
  const std::array<int64_t, 2> sizes{m.rows, m.columns}, strides{m.row_stride, m.column_stride};
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(m.data, {sizes.data(), 2}, {strides.data(), 2}, cpu, kType<T>);
}

template <class T>
Matrix<T> contiguous(T* data, int64_t rows, int64_t columns) {
  return {data, rows, columns, columns, 1};
}

// Whether a product is gemm's: with a short side, packing takes longer than the product.
template <class T>
bool for_gemm(const Matrix<T>& a, const Matrix<T>& b) {
  return std::is_same_v<T, float> && has_gemm() && std::min({a.rows, a.columns, b.columns}) > kFewRows;
}

// out = a b, plus what is there if `add`. The dispatcher has no stable form for the numbers that addmm takes; the
// interface of compiled models has.
template <class T>
void multiply(const Matrix<T>& out, const Matrix<T>& a, const Matrix<T>& b, bool add = false) {
  if constexpr (std::is_same_v<T, float>) {
    if (for_gemm(a, b)) return gemm(out, a, b, nullptr, add);
  }
  const Tensor to = view(out), left = view(a), right = view(b);
  TORCH_ERROR_CODE_CHECK(add ? aoti_torch_cpu_addmm_out(to.get(), to.get(), left.get(), right.get(), 1.0, 1.0)
                             : aoti_torch_cpu_mm_out(to.get(), left.get(), right.get()));
}

// Call work(begin, count) for pieces of the rows of a tile, on all threads, as many and as large for each.
template <class Work>
void in_pieces(int64_t rows, int64_t columns, const Work& work) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(columns, 1)), needed = (rows + grain - 1) / grain;
  const int64_t pieces = (needed + threads - 1) / threads * threads;
  const int64_t each = std::max<int64_t>(1, (rows + pieces - 1) / std::max<int64_t>(pieces, 1));
  for_each_if(needed > 1 && threads > 1, (rows + each - 1) / each, [&](int64_t i) {
    work(i * each, std::min(each, rows - i * each));
  });
}

// out = x wᵀ + b.
template <class T>
void project(const Matrix<T>& out, const Matrix<T>& x, const Matrix<T>& w, const T* bias) {
  if constexpr (std::is_same_v<T, float>) {
    if (for_gemm(x, w.transposed())) return gemm(out, x, w.transposed(), bias, false);
    if (x.rows <= kFewRows && x.column_stride == 1 && w.column_stride == 1) return project_few(out, x, w, bias);
  }
  if (bias != nullptr) {
    in_pieces(out.rows, out.columns, [&](int64_t begin, int64_t count) {
      for (int64_t i = begin; i < begin + count; ++i) std::copy_n(bias, out.columns, out.data + i * out.row_stride);
    });
  }
  multiply(out, x, w.transposed(), bias != nullptr);
}

template <class T>
T* at(T* data, int64_t offset) {
  return data == nullptr ? nullptr : data + offset;
}

// Sums over chunks of products out (+)= aᵀ b. Halves are summed in float, from products that are rounded once each.
template <class T>
class WeightGradient {
 public:
  WeightGradient(Wide<T>* sum, int64_t rows, int64_t columns)
      : sum_(sum), rows_(rows), columns_(columns), part_(kDirect || sum == nullptr ? 0 : rows * columns) {
    if (!kDirect && sum != nullptr) std::fill_n(sum, rows * columns, 0.0f);
  }
  explicit operator bool() const { return sum_ != nullptr; }
  void add(const Matrix<T>& a, const Matrix<T>& b, bool first) {
    if (sum_ == nullptr) return;
    if constexpr (kDirect) {
      multiply(contiguous(sum_, rows_, columns_), a.transposed(), b, !first);
    } else {
      multiply(contiguous(part_.data(), rows_, columns_), a.transposed(), b);
      in_pieces(rows_, columns_, [&](int64_t i, int64_t count) {
        accumulate(part_.data() + i * columns_, count * columns_, sum_ + i * columns_);
      });
    }
  }

 private:
  static constexpr bool kDirect = std::is_same_v<T, Wide<T>>;
  Wide<T>* sum_;
  int64_t rows_, columns_;
  Buffer<T> part_;
};

// Sums over chunks of the columns of a matrix, or of two matrices' product by elements, in double until the end.
template <class T>
class ColumnSums {
 public:
  ColumnSums(Wide<T>* out, int64_t columns) : out_(out), sum_(out == nullptr ? 0 : columns, 0.0) {}
  explicit operator bool() const { return out_ != nullptr; }
  void add(const Matrix<T>& m) {
    in_blocks(m, [&](int64_t j, int64_t n) { add_columns(m.data + j, m.rows, n, m.row_stride, sum_.data() + j); });
  }
  void add(const Matrix<T>& a, const T* b) {
    in_blocks(a, [&](int64_t j, int64_t n) {
      add_products(a.data + j, b + j, a.rows, n, a.row_stride, sum_.data() + j);
    });
  }
  // Sums down the columns of a contiguous matrix of sums and of one with any strides.
  void add(const Wide<T>* a, const Matrix<T>& b) {
    in_blocks(b, [&](int64_t j, int64_t n) {
      for (int64_t i = 0; i < b.rows; ++i) {
        const T* row = b.data + i * b.row_stride;
        for (int64_t l = j; l < j + n; ++l) {
          sum_[l] += static_cast<double>(a[i * b.columns + l]) * static_cast<Wide<T>>(row[l * b.column_stride]);
        }
      }
    });
  }
  void finish() const {
    if (out_ != nullptr) std::copy(sum_.begin(), sum_.end(), out_);
  }

 private:
  template <class Work>
  void in_blocks(const Matrix<T>& m, const Work& work) {
    if (out_ == nullptr) return;
    constexpr int64_t width = 32;
    const int64_t pieces = (m.columns + width - 1) / width;
    for_each_if(m.rows * m.columns > kGrain && torch::stable::get_num_threads() > 1, pieces, [&](int64_t i) {
      work(i * width, std::min(width, m.columns - i * width));
    });
  }

  Wide<T>* out_;
  std::vector<double> sum_;
};

// How many tokens go through a block at once. Every thread has a share of a chunk, and caches of its own.
struct Chunks {
  Chunks(int64_t rows, int64_t h) : rows(rows) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t most = threads * std::clamp(kTileElements / std::max<int64_t>(h, 1), kLeastRows, kMostRows);
    count = (rows + most - 1) / most;
  }
  // Chunks differ by a row at most: a short one would be multiplied otherwise.
  int64_t begin(int64_t i) const { return i * rows / count; }
  int64_t largest() const { return count == 0 ? 0 : (rows + count - 1) / count; }

  int64_t rows, count;
};

// The block's factors around phi, ones where only the other is there or a gate wants them; the one behind where it is asked
// for.
template <class T>
class Around {
 public:
  Around(const FFN<T>& ffn, bool with_behind) {
    const Wide<T>* behind = with_behind ? ffn.behind : nullptr;
    if (ffn.before == nullptr && behind == nullptr && ffn.limits() == nullptr) return;
    ones_.assign(ffn.w_in.rows, Wide<T>{1});
    factors = {ffn.before == nullptr ? ones() : ffn.before, behind == nullptr ? ones() : behind};
  }
  const Wide<T>* ones() const { return ones_.data(); }

  Factors<T> factors;

 private:
  std::vector<Wide<T>> ones_;
};

}  // namespace

template <class T>
void mlp_forward(const FFN<T>& ffn, Matrix<T> x, T* y, T* z, T* g, T* a) {
  const int64_t h = ffn.w_in.rows, d_out = ffn.w_out.columns;
  const Chunks chunks(x.rows, h);
  const int64_t tile = chunks.largest() * h;
  const bool gated = static_cast<bool>(ffn.w_gate), apart = a != nullptr && ffn.behind != nullptr;
  const Around<T> around(ffn, !apart);
  // Activations take the place of pre-activations that nobody keeps; kept ones lack the factors that the product needs.
  const Buffer<T> z_tile(z == nullptr ? tile : 0), g_tile(gated && g == nullptr ? tile : 0);
  const Buffer<T> a_tile(apart || (a == nullptr && z != nullptr) ? tile : 0);
  for (int64_t i = 0; i < chunks.count; ++i) {
    const int64_t begin = chunks.begin(i), end = chunks.begin(i + 1), rows = end - begin;
    const Matrix<T> tokens = x.narrow(begin, end);
    T* zs = z == nullptr ? z_tile.data() : z + begin * h;
    T* gs = !gated ? nullptr : g == nullptr ? g_tile.data() : g + begin * h;
    T* as = a != nullptr ? a + begin * h : z == nullptr ? zs : a_tile.data();
    T* scaled = apart ? a_tile.data() : as;
    project(contiguous(zs, rows, h), tokens, ffn.w_in, ffn.b_in);
    if (gated) project(contiguous(gs, rows, h), tokens, ffn.w_gate, ffn.b_gate);
    in_pieces(rows, h, [&](int64_t i, int64_t count) {
      activate<T>(ffn.phi, zs + i * h, at(gs, i * h), count, h, around.factors, ffn.limits(), as + i * h);
      if (apart) scale_columns<T>(as + i * h, count, h, ffn.behind, scaled + i * h);
    });
    project(contiguous(y + begin * d_out, rows, d_out), contiguous(scaled, rows, h), ffn.w_out.transposed(), ffn.b_out);
  }
}

template <class T>
void mlp_backward(const FFN<T>& ffn, Matrix<T> dy, Matrix<T> x, T* z, T* g, T* a, const MlpGradients<T>& out) {
  const int64_t h = ffn.w_in.rows, d = x.columns, d_out = ffn.w_out.columns;
  const Chunks chunks(x.rows, h);
  const int64_t tile = chunks.largest() * h;
  const bool gated = static_cast<bool>(ffn.w_gate);
  const bool inner = out.dx != nullptr || out.dw_in != nullptr || out.db_in != nullptr || out.dw_gate != nullptr ||
                     out.db_gate != nullptr || out.d_before != nullptr;
  const bool outer = out.dw_out != nullptr || out.d_behind != nullptr;
  const bool needs_a = outer && a == nullptr, again = z == nullptr && (inner || needs_a);
  const Buffer<T> z_tile(again ? tile : 0), g_tile(again && gated ? tile : 0);
  const Buffer<T> dz_tile(inner ? tile : 0), dg_tile(inner && gated ? tile : 0), a_tile(needs_a ? tile : 0);
  const Buffer<Wide<T>> k_of_its_own(outer && out.dw_out == nullptr ? d_out * h : 0);
  Wide<T>* k_sum = outer && out.dw_out == nullptr ? k_of_its_own.data() : out.dw_out;
  WeightGradient<T> dw_in(out.dw_in, h, d), dw_gate(out.dw_gate, h, d), k(k_sum, d_out, h);
  ColumnSums<T> db_in(out.db_in, h), db_gate(out.db_gate, h), db_out(out.db_out, d_out);
  ColumnSums<T> d_before(out.d_before, h), d_behind(out.d_behind, h);
  const Around<T> around(ffn, inner);
  for (int64_t i = 0; i < chunks.count; ++i) {
    const int64_t begin = chunks.begin(i), end = chunks.begin(i + 1), rows = end - begin;
    const bool first = begin == 0;
    const Matrix<T> tokens = x.narrow(begin, end), upstream = dy.narrow(begin, end);
    T *zs = z == nullptr ? z_tile.data() : z + begin * h, *gs = nullptr;
    if (gated) gs = g == nullptr ? g_tile.data() : g + begin * h;
    T* as = a == nullptr ? a_tile.data() : a + begin * h;
    if (again) {
      project(contiguous(zs, rows, h), tokens, ffn.w_in, ffn.b_in);
      if (gated) project(contiguous(gs, rows, h), tokens, ffn.w_gate, ffn.b_gate);
    }
    if (inner) {
      T *dzs = dz_tile.data(), *dgs = dg_tile.data(), *of_phi = gated ? dgs : dzs;
      multiply(contiguous(dzs, rows, h), upstream, ffn.w_out.transposed());
      in_pieces(rows, h, [&](int64_t i, int64_t count) {
        activate_backward<T>(ffn.phi, dzs + i * h, zs + i * h, at(gs, i * h), count, h, around.factors, ffn.limits(),
                             d_before ? around.ones() : around.factors.before, dzs + i * h, at(dgs, i * h),
                             needs_a ? as + i * h : nullptr);
      });
      const Matrix<T> dz = contiguous(dzs, rows, h), dg = contiguous(dgs, rows, h);
      if (d_before) {
        const bool both = ffn.limits() != nullptr;
        d_before.add(gated ? dg : dz, gated ? gs : zs);
        if (both) d_before.add(dz, zs);
        in_pieces(rows, h, [&](int64_t i, int64_t count) {
          scale_columns<T>(of_phi + i * h, count, h, ffn.before, of_phi + i * h);
          if (both) scale_columns<T>(dzs + i * h, count, h, ffn.before, dzs + i * h);
        });
      }
      if (out.dx != nullptr) {
        const Matrix<T> dx = contiguous(out.dx + begin * d, rows, d);
        multiply(dx, dz, ffn.w_in);
        if (gated) multiply(dx, dg, ffn.w_gate, true);
      }
      dw_in.add(dz, tokens, first);
      dw_gate.add(dg, tokens, first);
      db_in.add(dz);
      db_gate.add(dg);
    } else if (needs_a) {
      in_pieces(rows, h, [&](int64_t i, int64_t count) {
        activate<T>(ffn.phi, zs + i * h, at(gs, i * h), count, h, around.factors, ffn.limits(), as + i * h);
      });
    }
    k.add(upstream, contiguous(as, rows, h), first);
    db_out.add(upstream);
  }
  if (x.rows > 0) {
    d_behind.add(k_sum, ffn.w_out.transposed());
    if (out.dw_out != nullptr && ffn.behind != nullptr) {
      in_pieces(d_out, h, [&](int64_t i, int64_t count) {
        scale_columns<Wide<T>>(k_sum + i * h, count, h, ffn.behind, k_sum + i * h);
      });
    }
  }
  for (const ColumnSums<T>* sum : {&db_in, &db_gate, &db_out, &d_before, &d_behind}) sum->finish();
}

#define MLP_INSTANTIATE(T)                                                     \
  template void mlp_forward(const FFN<T>&, Matrix<T>, T*, T*, T*, T*);       \
  template void mlp_backward(const FFN<T>&, Matrix<T>, Matrix<T>, T*, T*, T*, const MlpGradients<T>&);
MLP_INSTANTIATE(float)
MLP_INSTANTIATE(double)
MLP_INSTANTIATE(BFloat16)
MLP_INSTANTIATE(Half)

}  // namespace mlp_fusion
