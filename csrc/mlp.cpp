// The compiled operators of a feed-forward block, steps of fusion_kernels/mlp/cpu_backend.py, which casts the weights;
// here only what would read out of bounds is checked.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "cpu/mlp.h"
#include "cpu/mlp_tensors.h"

namespace mlp_fusion {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
T* data(const Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : static_cast<T*>(tensor.data_ptr());
}

// An element that pointers to empty tensors may point to: null means that a tensor is not there.
alignas(64) char kNowhere[64];

void check(const Tensor& t, const char* name, ScalarType dtype, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype && t.dim() == 2 && t.size(0) == rows && t.size(1) == columns,
                  name, ": wrong device, dtype or shape");
}

template <class T>
Matrix<T> matrix(const Tensor& t, const char* name, ScalarType dtype, int64_t rows, int64_t columns) {
  check(t, name, dtype, rows, columns);
  T* elements = t.numel() == 0 ? reinterpret_cast<T*>(kNowhere) : static_cast<T*>(t.data_ptr());
  return {elements, rows, columns, t.stride(0), t.stride(1)};
}

template <class T>
T* bias(const std::optional<Tensor>& t, const char* name, ScalarType dtype, int64_t n) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->is_cpu() && t->scalar_type() == dtype && t->is_contiguous() && t->dim() == 1 && t->size(0) == n,
                  name, ": wrong device, dtype, shape or strides");
  return data<T>(*t);
}

// The elements of what the forward kept, null where it is empty: (T, h), contiguous.
template <class T>
T* kept(const Tensor& t, const char* name, ScalarType dtype, int64_t rows, int64_t h) {
  if (t.numel() == 0) return nullptr;
  check(t, name, dtype, rows, h);
  STD_TORCH_CHECK(t.is_contiguous(), name, ": must be contiguous");
  return data<T>(t);
}

template <class Work>
auto with_dtype(const Tensor& x, const Work& work) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return work(double{});
    case ScalarType::BFloat16:
      return work(BFloat16{});
    case ScalarType::Half:
      return work(Half{});
    default:
      STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "mlp: float16, bfloat16, float32 or float64 expected");
      return work(float{});
  }
}

// What sums over tokens and the scale are in.
template <class T>
constexpr ScalarType kSums = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

template <class T>
FFN<T> make_ffn(const Tensor& x, const Tensor& w_in, const Tensor& w_out, const std::optional<Tensor>& w_gate,
                const std::optional<Tensor>& b_in, const std::optional<Tensor>& b_gate,
                const std::optional<Tensor>& b_out, const std::optional<Tensor>& scale, const std::string& activation,
              const std::optional<double>& limit, const std::string& clamp, double up_offset) {
  STD_TORCH_CHECK(x.dim() == 2 && w_in.dim() == 2 && w_out.dim() == 2, "mlp: x and the weights must be matrices");
  const std::optional<Activation> phi = activation_named(activation);
  STD_TORCH_CHECK(phi.has_value(), "mlp: unknown activation ", activation);
  const std::optional<Gate<Wide<T>>> gate = gate_of<Wide<T>, T>(limit, clamp, up_offset);
  STD_TORCH_CHECK(gate.has_value(), "mlp: unknown clamp ", clamp);
  STD_TORCH_CHECK(gate->plain() || w_gate.has_value(), "mlp: a plain block has no gate");
  const int64_t h = w_in.size(0), d = x.size(1), d_out = w_out.size(1);
  const ScalarType dtype = x.scalar_type();
  FFN<T> ffn{*phi,
             matrix<T>(w_in, "w_in", dtype, h, d),
             matrix<T>(w_out, "w_out", dtype, h, d_out),
             {},
             bias<T>(b_in, "b_in", dtype, h),
             bias<T>(b_gate, "b_gate", dtype, h),
             bias<T>(b_out, "b_out", dtype, d_out),
             nullptr,
             nullptr,
             *gate};
  if (w_gate) ffn.w_gate = matrix<T>(*w_gate, "w_gate", dtype, h, d);
  if (scale && h > 0) {
    const bool both = scale->dim() == 2;
    STD_TORCH_CHECK(scale->is_cpu() && scale->scalar_type() == kSums<T> && scale->is_contiguous() &&
                        scale->numel() == (both ? 2 * h : h) && (!both || scale->size(0) == 2),
                    "scale: wrong device, dtype, shape or strides");
    ffn.behind = data<Wide<T>>(*scale);
    if (both) ffn.before = ffn.behind + h;
  }
  return ffn;
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Outputs forward(const Tensor x, const Tensor w_in, const Tensor w_out, const std::optional<Tensor> w_gate,
                const std::optional<Tensor> b_in, const std::optional<Tensor> b_gate, const std::optional<Tensor> b_out,
                const std::optional<Tensor> scale, const std::string activation,
                const std::optional<double> limit, const std::string clamp, double up_offset,
                int64_t checkpoint_level) {
  return with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const FFN<T> ffn = make_ffn<T>(x, w_in, w_out, w_gate, b_in, b_gate, b_out, scale, activation, limit,
                                     clamp, up_offset);
    const int64_t rows = x.size(0), h = w_in.size(0), d_out = w_out.size(1);
    const auto dtype = x.scalar_type();
    const auto hidden = [&](bool keep) { return keep ? allocate<2>({rows, h}, dtype) : allocate<1>({0}, dtype); };
    Tensor y = allocate<2>({rows, d_out}, dtype), z = hidden(checkpoint_level < 2);
    Tensor g = hidden(checkpoint_level < 2 && w_gate.has_value()), a = hidden(checkpoint_level == 0);
    if (rows > 0) {
      mlp_forward<T>(ffn, matrix<T>(x, "x", dtype, rows, x.size(1)), data<T>(y), data<T>(z), data<T>(g), data<T>(a));
    }
    return Outputs{y, z, g, a};
  });
}

// y alone, for where nothing is kept.
Tensor output(const Tensor x, const Tensor w_in, const Tensor w_out, const std::optional<Tensor> w_gate,
              const std::optional<Tensor> b_in, const std::optional<Tensor> b_gate, const std::optional<Tensor> b_out,
              const std::optional<Tensor> scale, const std::string activation,
              const std::optional<double> limit, const std::string clamp, double up_offset) {
  return with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const FFN<T> ffn = make_ffn<T>(x, w_in, w_out, w_gate, b_in, b_gate, b_out, scale, activation, limit,
                                     clamp, up_offset);
    const int64_t rows = x.size(0);
    Tensor y = allocate<2>({rows, w_out.size(1)}, x.scalar_type());
    if (rows > 0) {
      mlp_forward<T>(ffn, matrix<T>(x, "x", x.scalar_type(), rows, x.size(1)), data<T>(y), nullptr, nullptr, nullptr);
    }
    return y;
  });
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The gradients of x and of the block's tensors, in their order, empty where `needs`, a bit for each from the lowest,
// does not ask for them. All but dx are float32, in a block of float64 float64.
Gradients backward(const Tensor dy, const Tensor x, const Tensor w_in, const Tensor w_out,
                   const std::optional<Tensor> w_gate, const std::optional<Tensor> b_in,
                   const std::optional<Tensor> b_gate, const std::optional<Tensor> b_out,
                   const std::optional<Tensor> scale, const Tensor z, const Tensor g, const Tensor a,
                   const std::string activation,
                   const std::optional<double> limit, const std::string clamp, double up_offset, int64_t needs) {
  return with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    using S = Wide<T>;
    const FFN<T> ffn = make_ffn<T>(x, w_in, w_out, w_gate, b_in, b_gate, b_out, scale, activation, limit,
                                     clamp, up_offset);
    const int64_t rows = x.size(0), d = x.size(1), h = w_in.size(0), d_out = w_out.size(1);
    const auto dtype = x.scalar_type();
    const auto sums = kSums<T>;
    const auto needed = [&](int bit) { return (needs >> bit & 1) != 0; };
    const auto matrix_of = [&](int bit, int64_t m, int64_t n, ScalarType type) {
      return needed(bit) ? allocate<2>({m, n}, type) : allocate<1>({0}, type);
    };
    const auto vector_of = [&](int bit, int64_t n) { return allocate<1>({needed(bit) ? n : 0}, sums); };
    Tensor dx = matrix_of(0, rows, d, dtype), dw_in = matrix_of(1, h, d, sums), dw_gate = matrix_of(3, h, d, sums);
    Tensor dw_out = needed(2) ? allocate_columns(h, d_out, sums) : allocate<1>({0}, sums);
    Tensor db_in = vector_of(4, h), db_gate = vector_of(5, h), db_out = vector_of(6, d_out);
    const bool both = scale && scale->dim() == 2;
    Tensor dscale = both ? matrix_of(7, 2, h, sums) : vector_of(7, h);
    if (rows == 0 || h == 0) {  // sums of nothing
      for (const Tensor* sum : {&dw_in, &dw_gate, &dw_out}) {
        std::fill_n(static_cast<S*>(sum->data_ptr()), sum->numel(), S{0});
      }
      std::fill_n(static_cast<T*>(dx.data_ptr()), dx.numel(), T(0.0f));
    }
    S* d_behind = data<S>(dscale);
    const MlpGradients<T> out{data<T>(dx),      data<S>(dw_in), data<S>(dw_out),
                              data<S>(dw_gate), data<S>(db_in), data<S>(db_gate),
                              data<S>(db_out), both && d_behind != nullptr ? d_behind + h : nullptr, d_behind};
    mlp_backward<T>(ffn, matrix<T>(dy, "dy", dtype, rows, d_out), matrix<T>(x, "x", dtype, rows, d),
                    kept<T>(z, "z", dtype, rows, h), kept<T>(g, "g", dtype, rows, h), kept<T>(a, "a", dtype, rows, h),
                    out);
    return Gradients{dx, dw_in, dw_out, dw_gate, db_in, db_gate, db_out, dscale};
  });
}

}  // namespace
}  // namespace mlp_fusion

STABLE_TORCH_LIBRARY_FRAGMENT(fusion_kernels_native, m) {
  m.def(
      "mlp(Tensor x, Tensor w_in, Tensor w_out, Tensor? w_gate, Tensor? b_in, Tensor? b_gate, Tensor? b_out, "
      "Tensor? scale, str activation, float? limit, str clamp, float up_offset, int checkpoint_level) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "mlp_output(Tensor x, Tensor w_in, Tensor w_out, Tensor? w_gate, Tensor? b_in, Tensor? b_gate, Tensor? b_out, "
      "Tensor? scale, str activation, float? limit, str clamp, float up_offset) -> Tensor");
  m.def(
      "mlp_backward(Tensor dy, Tensor x, Tensor w_in, Tensor w_out, Tensor? w_gate, Tensor? b_in, Tensor? b_gate, "
      "Tensor? b_out, Tensor? scale, Tensor z, Tensor g, Tensor a, str activation, float? limit, str clamp, "
      "float up_offset, int needs) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fusion_kernels_native, CPU, m) {
  m.impl("mlp", TORCH_BOX(&mlp_fusion::forward));
  m.impl("mlp_output", TORCH_BOX(&mlp_fusion::output));
  m.impl("mlp_backward", TORCH_BOX(&mlp_fusion::backward));
}
