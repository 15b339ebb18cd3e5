// The CUDA operators, a library of its own beside the CPU's, so that either loads without the other. They are the steps of
// fusion_kernels/ntk/cuda_backend.py, which checks values and weighs neurons; here only what would read out of bounds is
// checked. LibTorch through its stable ABI alone.
#define USE_CUDA  // the part of the ABI that knows streams
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <array>
#include <optional>
#include <string>

#include "../cpu/tensors.h"
#include "ntk.h"

namespace mlp_fusion::cuda {
namespace {

void check_here(const Tensor& tensor, const char* name, ScalarType dtype, std::initializer_list<int64_t> shape,
                int32_t device) {
  check(tensor, name, dtype, shape, DeviceType::CUDA);
  STD_TORCH_CHECK(tensor.get_device_index() == device, name, ": on another device than the first tensor");
}

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

Format format_named(const std::string& precision) {
  if (precision == "highest") return Format::plain;
  if (precision == "bf16") return Format::bfloat16;
  if (precision == "bf16x3") return Format::bfloat16_twice;
  STD_TORCH_CHECK(precision == "tf32x3", "ntk_operand: unknown precision ", precision);
  return Format::tf32_twice;
}

Tensor operand(const Tensor x, const Tensor z, const std::optional<Tensor> g, const std::optional<Tensor> shrink,
               const Tensor of_hidden, const Tensor of_in, const std::optional<Tensor> of_gate, std::string activation,
               std::optional<double> limit, std::string clamp, double up_offset, bool signs, bool with_inputs,
               bool with_in, bool with_gate, bool with_hidden, std::string precision) {
  STD_TORCH_CHECK(x.dim() == 2 && z.dim() == 2, "ntk_operand: x must be (N, d) and z (N, h)");
  const ScalarType dtype = x.scalar_type();
  const int64_t n = x.size(0), d = x.size(1), h = z.size(1);
  const int32_t device = x.get_device_index();
  check_here(x, "x", dtype, {n, d}, device);
  check_here(z, "z", dtype, {n, h}, device);
  if (g) check_here(*g, "g", dtype, {n, h}, device);
  STD_TORCH_CHECK(g.has_value() == of_gate.has_value() && (g.has_value() || !with_gate),
                  "ntk_operand: g, of_gate and slopes of the gate belong together");
  for (const auto* vector : {&shrink, &of_gate}) {
    if (*vector) check_here(**vector, "a vector of neurons", dtype, {h}, device);
  }
  check_here(of_hidden, "of_hidden", dtype, {h}, device);
  check_here(of_in, "of_in", dtype, {h}, device);
  const std::optional<Activation> phi = activation_named(activation);
  STD_TORCH_CHECK(phi.has_value(), "ntk_operand: unknown activation ", activation);
  const Format format = format_named(precision);
  STD_TORCH_CHECK(format == Format::plain || dtype == ScalarType::Float, "ntk_operand: ", precision, " is for float32");

  const torch::stable::accelerator::DeviceGuard guard(device);
  const Columns columns{with_inputs ? padded_columns(d) : 0, with_in ? padded_columns(h) : 0,
                        with_gate ? padded_columns(h) : 0, with_hidden ? padded_columns(h) : 0};
  const std::array<int64_t, 3> shape{planes(format), n, columns.all()};
  const bool low = format == Format::bfloat16 || format == Format::bfloat16_twice;
  Tensor result =
      torch::stable::new_empty(x, {shape.data(), shape.size()}, low ? ScalarType::BFloat16 : dtype);
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const std::optional<Gate<T>> gate = gate_of<T, T>(limit, clamp, up_offset);
    STD_TORCH_CHECK(gate.has_value(), "ntk_operand: unknown clamp ", clamp);
    const Factors<T> factors{data<T>(x),     data<T>(z),       data<T>(g), data<T>(shrink), data<T>(of_hidden),
                             data<T>(of_in), data<T>(of_gate), n,          d,               h,
                             columns,        *phi,             *gate,      signs};
    STD_CUDA_CHECK(write_operand(factors, format, result.data_ptr(), current_stream(device)));
  });
  return result;
}

// The operands have `inputs` columns of inputs, `slopes` times `neurons` of slopes and, with `hidden`, `neurons` of hidden
// values, each range padded.
void tiles(const Tensor left, const Tensor right, int64_t inputs, int64_t neurons, int64_t slopes, bool hidden,
           double bias, double constant, bool accumulate, bool symmetric, Tensor out) {
  STD_TORCH_CHECK(left.dim() == 3 && right.dim() == 3 && out.dim() == 2, "ntk_tiles: wrong dimensions");
  const int64_t planes = left.size(0), n1 = left.size(1), n2 = right.size(1), columns = left.size(2);
  const int32_t device = left.get_device_index();
  const ScalarType dtype = left.scalar_type();
  const bool low = dtype == ScalarType::BFloat16;
  // Rows of a larger operand are as good as a whole one.
  for (const Tensor* side : {&left, &right}) {
    STD_TORCH_CHECK(side->device().type() == DeviceType::CUDA && side->get_device_index() == device &&
                        side->scalar_type() == dtype && side->size(0) == planes && side->size(2) == columns &&
                        (columns == 0 || side->stride(2) == 1) &&
                        (columns == 0 || side->stride(1) == columns || side->size(1) <= 1),
                    "ntk_tiles: an operand of wrong device, dtype, shape or strides");
  }
  STD_TORCH_CHECK(planes == 1 || (planes == 2 && dtype != ScalarType::Double),
                  "ntk_tiles: one plane, or two of bfloat16 or TF32");
  STD_TORCH_CHECK(inputs >= 0 && neurons >= 0 && slopes >= 0 && slopes <= 2 && (!symmetric || n1 == n2),
                  "ntk_tiles: wrong sizes");
  const int64_t range = padded_columns(neurons);
  const Columns ranges{padded_columns(inputs), slopes * range, 0, hidden ? range : 0};
  STD_TORCH_CHECK(ranges.all() == columns && columns <= INT32_MAX / 2, "ntk_tiles: the operands have other columns");
  STD_TORCH_CHECK(out.device().type() == DeviceType::CUDA && out.get_device_index() == device &&
                      out.scalar_type() == (low ? ScalarType::Float : dtype) && out.size(0) == n1 &&
                      out.size(1) == n2 && (out.stride(1) == 1 || n2 <= 1) && (out.stride(0) >= n2 || n1 <= 1),
                  "out: wrong device, dtype, shape or strides");

  const torch::stable::accelerator::DeviceGuard guard(device);
  with_dtype(out, [&](auto zero) {
    using T = decltype(zero);
    const Gram<T> gram{left.data_ptr(),
                       right.data_ptr(),
                       left.stride(0),
                       right.stride(0),
                       n1,
                       n2,
                       ranges,
                       static_cast<T>(bias),
                       static_cast<T>(constant),
                       accumulate,
                       symmetric,
                       mutable_data<T>(out),
                       n1 <= 1 ? n2 : out.stride(0)};
    if constexpr (sizeof(T) == sizeof(float)) {
      if (low || planes == 2) {
        const Format format = !low ? Format::tf32_twice : planes == 2 ? Format::bfloat16_twice : Format::bfloat16;
        STD_CUDA_CHECK(gram_tensor_cores(gram, format, current_stream(device)));
        return;
      }
    }
    STD_CUDA_CHECK(gram_plain(gram, current_stream(device)));
  });
}

// Adds to `sums` (groups of columns, 4), `rows` (2, strip's rows) and `columns` (2, at least the strip's).
void strip(const Tensor a, const Tensor b, int64_t first, bool symmetric, Tensor sums, Tensor rows, Tensor columns) {
  STD_TORCH_CHECK(a.dim() == 2 && columns.dim() == 2 && rows.dim() == 2, "ntk_strip: wrong dimensions");
  const int64_t n = a.size(0), m = a.size(1);
  const int32_t device = a.get_device_index();
  const ScalarType dtype = a.scalar_type();
  check_here(a, "a", dtype, {n, m}, device);
  check_here(b, "b", dtype, {n, m}, device);
  check_here(sums, "sums", ScalarType::Double, {sums.size(0), 4}, device);
  check_here(columns, "columns", ScalarType::Double, {2, columns.size(1)}, device);
  STD_TORCH_CHECK(rows.device().type() == DeviceType::CUDA && rows.get_device_index() == device &&
                      rows.scalar_type() == ScalarType::Double && rows.size(0) == 2 && rows.size(1) == n &&
                      (rows.stride(1) == 1 || n <= 1),
                  "rows: wrong device, dtype, shape or strides");
  STD_TORCH_CHECK(first >= 0 && columns.size(1) >= m && sums.size(0) >= strips::groups(m), "ntk_strip: wrong sizes");
  const torch::stable::accelerator::DeviceGuard guard(device);
  with_dtype(a, [&](auto zero) {
    using T = decltype(zero);
    const Strip<T> strip{data<T>(a),
                         data<T>(b),
                         n,
                         m,
                         m,
                         first,
                         symmetric,
                         mutable_data<double>(sums),
                         mutable_data<double>(rows),
                         mutable_data<double>(columns),
                         rows.stride(0),
                         columns.size(1)};
    STD_CUDA_CHECK(strip_sums(strip, current_stream(device)));
  });
}

}  // namespace
}  // namespace mlp_fusion::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fusion_kernels_cuda, m) {
  m.def(
      "ntk_operand(Tensor x, Tensor z, Tensor? g, Tensor? shrink, Tensor of_hidden, Tensor of_in, Tensor? of_gate, "
      "str activation, float? limit, str clamp, float up_offset, bool signs, bool inputs, bool slopes_in, "
      "bool slopes_gate, bool hidden, str precision) -> Tensor");
  m.def(
      "ntk_tiles(Tensor left, Tensor right, int inputs, int neurons, int slopes, bool hidden, float bias, "
      "float constant, bool accumulate, bool symmetric, Tensor(a!) out) -> ()");
  m.def(
      "ntk_strip(Tensor a, Tensor b, int first, bool symmetric, Tensor(a!) sums, Tensor(b!) rows, Tensor(c!) columns) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusion_kernels_cuda, CUDA, m) {
  m.impl("ntk_operand", TORCH_BOX(&mlp_fusion::cuda::operand));
  m.impl("ntk_tiles", TORCH_BOX(&mlp_fusion::cuda::tiles));
  m.impl("ntk_strip", TORCH_BOX(&mlp_fusion::cuda::strip));
}
