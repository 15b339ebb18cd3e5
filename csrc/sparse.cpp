// The compiled operators of fusion_kernels/sparse; here what would read or write out of bounds is checked.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/mlp_tensors.h"
#include "cpu/sampled.h"

namespace mlp_fusion {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
Matrix<T> matrix(const Tensor& t, const char* name, ScalarType dtype, int64_t rows) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype && t.dim() == 2 && t.size(0) == rows,
                  name, ": wrong device, dtype or shape");
  return {static_cast<T*>(t.data_ptr()), rows, t.size(1), t.stride(0), t.stride(1)};
}

const int32_t* entries(const Tensor& t, const char* name, int64_t count, int64_t bound) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Int && t.is_contiguous() && t.dim() == 1 &&
                      t.size(0) == count,
                  name, ": wrong device, dtype, shape or strides");
  const int32_t* found = static_cast<const int32_t*>(t.data_ptr());
  for (int64_t e = 0; e < count; ++e) {
    STD_TORCH_CHECK(found[e] >= 0 && found[e] < bound, name, ": an entry is outside of the product");
  }
  return found;
}

template <class T>
Tensor product(const Tensor& g, const Tensor& x, const Tensor& rows, const Tensor& columns, ScalarType dtype,
               ScalarType sums) {
  const Matrix<T> left = matrix<T>(g, "g", dtype, g.size(0)), right = matrix<T>(x, "x", dtype, g.size(0));
  const int64_t count = rows.size(0);
  Tensor out = allocate<1>({count}, sums);
  const int32_t *at = entries(rows, "rows", count, left.columns), *to = entries(columns, "columns", count, right.columns);
  if (count > 0) sampled_product(left, right, at, to, count, static_cast<Wide<T>*>(out.data_ptr()));
  return out;
}

Tensor sampled(const Tensor g, const Tensor x, const Tensor rows, const Tensor columns) {
  STD_TORCH_CHECK(g.dim() == 2 && rows.dim() == 1, "sampled_product: g must be a matrix and rows a vector");
  const ScalarType dtype = g.scalar_type();
  switch (dtype) {
    case ScalarType::Double:
      return product<double>(g, x, rows, columns, dtype, ScalarType::Double);
    case ScalarType::BFloat16:
      return product<BFloat16>(g, x, rows, columns, dtype, ScalarType::Float);
    case ScalarType::Half:
      return product<Half>(g, x, rows, columns, dtype, ScalarType::Float);
    default:
      STD_TORCH_CHECK(dtype == ScalarType::Float, "sampled_product: float16, bfloat16, float32 or float64 expected");
      return product<float>(g, x, rows, columns, dtype, ScalarType::Float);
  }
}

}  // namespace
}  // namespace mlp_fusion

STABLE_TORCH_LIBRARY_FRAGMENT(fusion_kernels_native, m) {
  m.def("sampled_product(Tensor g, Tensor x, Tensor rows, Tensor columns) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fusion_kernels_native, CPU, m) {
  m.impl("sampled_product", TORCH_BOX(&mlp_fusion::sampled));
}
