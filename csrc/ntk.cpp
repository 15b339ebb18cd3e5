// The compiled steps of the tangent-kernel operators, called by fusion_kernels/ntk/cpu_backend.py, which checks values
// and weighs neurons; here only what would read out of bounds is checked.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/ntk.h"
#include "cpu/tensors.h"

namespace mlp_fusion {
namespace {

std::tuple<Tensor, Tensor> factors(const Tensor x, const Tensor w_in, const std::optional<Tensor> w_gate,
                                   const std::optional<Tensor> b_in, const std::optional<Tensor> b_gate,
                                   const std::optional<Tensor> shrink, const Tensor of_hidden, const Tensor of_in,
                                   const std::optional<Tensor> of_gate, std::string activation,
                                   std::optional<double> limit, std::string clamp, double up_offset, bool signs) {
  STD_TORCH_CHECK(x.dim() == 2 && w_in.dim() == 2, "ntk_factors: x must be (N, d) and w_in (h, d)");
  const ScalarType dtype = x.scalar_type();
  const int64_t n = x.size(0), d = x.size(1), h = w_in.size(0);
  check(x, "x", dtype, {n, d});
  check(w_in, "w_in", dtype, {h, d});
  if (w_gate) check(*w_gate, "w_gate", dtype, {h, d});
  STD_TORCH_CHECK(w_gate.has_value() == of_gate.has_value(), "ntk_factors: w_gate and of_gate belong together");
  for (const auto* vector : {&b_in, &b_gate, &shrink, &of_gate}) {
    if (*vector) check(**vector, "a vector of neurons", dtype, {h});
  }
  check(of_hidden, "of_hidden", dtype, {h});
  check(of_in, "of_in", dtype, {h});
  const std::optional<Activation> phi = activation_named(activation);
  STD_TORCH_CHECK(phi.has_value(), "ntk_factors: unknown activation ", activation);
  Tensor hidden = new_tensor({n, h}, dtype), slopes = new_tensor({n, w_gate ? 2 * h : h}, dtype);
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const std::optional<Gate<T>> gate = gate_of<T, T>(limit, clamp, up_offset);
    STD_TORCH_CHECK(gate.has_value(), "ntk_factors: unknown clamp ", clamp);
    const Neurons<T> neurons{data<T>(w_in),   data<T>(w_gate),    data<T>(b_in),  data<T>(b_gate),
                             data<T>(shrink), data<T>(of_hidden), data<T>(of_in), data<T>(of_gate),
                             d,               h,                  *phi, *gate, signs};
    block_factors(neurons, data<T>(x), n, mutable_data<T>(hidden), mutable_data<T>(slopes));
  });
  return {hidden, slopes};
}

// `terms`: begin, columns, weights, bias of each. The sides' tensors are checked against n1 and n2 rows.
template <class T>
TangentKernel<T> tangent_kernel(const Tensor& x1, const Tensor& x2, const std::optional<Tensor>& hidden1,
                                const std::optional<Tensor>& hidden2, const Tensor& slopes1, const Tensor& slopes2,
                                const std::vector<int64_t>& terms, double constant) {
  STD_TORCH_CHECK(x1.dim() == 2 && slopes1.dim() == 2 && hidden1.has_value() == hidden2.has_value(),
                  "ntk: matrices expected, and hidden values of both sides or of none");
  const ScalarType dtype = x1.scalar_type();
  const int64_t n1 = x1.size(0), d = x1.size(1), n2 = x2.size(0), width = slopes1.size(1);
  check(x1, "x1", dtype, {n1, d});
  check(x2, "x2", dtype, {n2, d});
  check(slopes1, "slopes1", dtype, {n1, width});
  check(slopes2, "slopes2", dtype, {n2, width});
  int64_t h = 0;
  if (hidden1) {
    STD_TORCH_CHECK(hidden1->dim() == 2, "hidden1: a matrix expected");
    h = hidden1->size(1);
    check(*hidden1, "hidden1", dtype, {n1, h});
    check(*hidden2, "hidden2", dtype, {n2, h});
  }
  TangentKernel<T> kernel{{data<T>(x1), data<T>(hidden1), data<T>(slopes1)},
                          {data<T>(x2), data<T>(hidden2), data<T>(slopes2)},
                          d, h, width, {}, static_cast<T>(constant)};
  STD_TORCH_CHECK(terms.size() % 4 == 0, "ntk: a term has four numbers");
  for (size_t k = 0; k < terms.size(); k += 4) {
    const Term term{terms[k], terms[k + 1], terms[k + 2] != 0, terms[k + 3] != 0};
    STD_TORCH_CHECK(term.begin >= 0 && term.columns >= 0 && term.begin + term.columns <= width,
                    "ntk: a term lies outside the slopes");
    kernel.terms.push_back(term);
  }
  return kernel;
}

void gram(const Tensor x1, const Tensor x2, const std::optional<Tensor> hidden1, const std::optional<Tensor> hidden2,
          const Tensor slopes1, const Tensor slopes2, std::vector<int64_t> terms, double constant, bool symmetric,
          int64_t tile, Tensor out) {
  const int64_t n1 = x1.size(0), n2 = x2.size(0);
  STD_TORCH_CHECK(tile >= 1 && (!symmetric || n1 == n2), "ntk_gram: wrong sizes");
  STD_TORCH_CHECK(out.is_cpu() && out.scalar_type() == x1.scalar_type() && out.dim() == 2 && out.size(0) == n1 &&
                      out.size(1) == n2 && (out.stride(1) == 1 || n2 <= 1) && (out.stride(0) >= n2 || n1 <= 1),
                  "out: wrong device, dtype, shape or strides");
  with_dtype(x1, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = tangent_kernel<T>(x1, x2, hidden1, hidden2, slopes1, slopes2, terms, constant);
    kernel_matrix(kernel, n1, n2, symmetric, tile, mutable_data<T>(out), n1 <= 1 ? n2 : out.stride(0));
  });
}

std::tuple<Tensor, Tensor, Tensor> sums(
    const Tensor x1, const Tensor x2, const std::optional<Tensor> a_hidden1, const std::optional<Tensor> a_hidden2,
    const Tensor a_slopes1, const Tensor a_slopes2, std::vector<int64_t> a_terms, double a_constant,
    const std::optional<Tensor> b_hidden1, const std::optional<Tensor> b_hidden2, const Tensor b_slopes1,
    const Tensor b_slopes2, std::vector<int64_t> b_terms, double b_constant, bool symmetric, int64_t tile) {
  const int64_t n1 = x1.size(0), n2 = x2.size(0);
  STD_TORCH_CHECK(tile >= 1 && (!symmetric || n1 == n2), "ntk_sums: wrong sizes");
  Tensor result = new_tensor({4}, ScalarType::Double), rows = new_tensor({2, n1}, ScalarType::Double),
         columns = new_tensor({2, n2}, ScalarType::Double);
  with_dtype(x1, [&](auto zero) {
    using T = decltype(zero);
    const auto a = tangent_kernel<T>(x1, x2, a_hidden1, a_hidden2, a_slopes1, a_slopes2, a_terms, a_constant);
    const auto b = tangent_kernel<T>(x1, x2, b_hidden1, b_hidden2, b_slopes1, b_slopes2, b_terms, b_constant);
    kernel_sums(a, b, n1, n2, symmetric, tile, mutable_data<double>(result), mutable_data<double>(rows),
                mutable_data<double>(columns));
  });
  return {result, rows, columns};
}

}  // namespace
}  // namespace mlp_fusion

STABLE_TORCH_LIBRARY_FRAGMENT(fusion_kernels_native, m) {
  m.def(
      "ntk_factors(Tensor x, Tensor w_in, Tensor? w_gate, Tensor? b_in, Tensor? b_gate, Tensor? shrink, "
      "Tensor of_hidden, Tensor of_in, Tensor? of_gate, str activation, float? limit, str clamp, float up_offset, "
      "bool signs) -> (Tensor, Tensor)");
  m.def(
      "ntk_gram(Tensor x1, Tensor x2, Tensor? hidden1, Tensor? hidden2, Tensor slopes1, Tensor slopes2, int[] terms, "
      "float constant, bool symmetric, int tile, Tensor(a!) out) -> ()");
  m.def(
      "ntk_sums(Tensor x1, Tensor x2, Tensor? a_hidden1, Tensor? a_hidden2, Tensor a_slopes1, Tensor a_slopes2, "
      "int[] a_terms, float a_constant, Tensor? b_hidden1, Tensor? b_hidden2, Tensor b_slopes1, Tensor b_slopes2, "
      "int[] b_terms, float b_constant, bool symmetric, int tile) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fusion_kernels_native, CPU, m) {
  m.impl("ntk_factors", TORCH_BOX(&mlp_fusion::factors));
  m.impl("ntk_gram", TORCH_BOX(&mlp_fusion::gram));
  m.impl("ntk_sums", TORCH_BOX(&mlp_fusion::sums));
}
