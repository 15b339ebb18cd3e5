// The Walsh-Hadamard transform and Fastfood, called by fusion_kernels/hadamard/cpu_backend.py; here what would read out of
// bounds is checked.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "cpu/hadamard.h"
#include "cpu/tensors.h"

namespace mlp_fusion {
namespace {

constexpr int64_t kMostBits = 30;

// Rows and entries of a matrix.
std::pair<int64_t, int64_t> shape_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2, name, " must be a matrix");
  check(x, name, x.scalar_type(), {x.size(0), x.size(1)});
  return {x.size(0), x.size(1)};
}

Keys keys_of(const std::vector<int64_t>& flat) {
  STD_TORCH_CHECK(static_cast<int64_t>(flat.size()) == Keys::kCount, "fastfood: wrong number of keys");
  const auto pair = [&](int64_t i) {
    return Keys::Pair{static_cast<uint32_t>(flat[2 * i]), static_cast<uint32_t>(flat[2 * i + 1])};
  };
  Keys keys{pair(0), pair(1), pair(2), {}};
  for (int64_t i = 0; i < Keys::kRounds; ++i) keys.rounds[i] = pair(3 + i);
  return keys;
}

void check_size(int64_t size, int64_t d) {
  STD_TORCH_CHECK(size >= 1 && size <= int64_t{1} << kMostBits, "fastfood: a size from 1 to 2^30 expected");
  STD_TORCH_CHECK(d >= 1 && d <= int64_t{1} << kMostBits, "fastfood: 1 to 2^30 entries of theta expected");
}

Tensor transform(const Tensor x) {
  const auto [rows, n] = shape_of(x, "x");
  int64_t bits = 0;
  while (int64_t{1} << bits < n && bits < 62) ++bits;
  STD_TORCH_CHECK(n == int64_t{1} << bits, "hadamard: a power of two of entries expected");
  Tensor to = new_tensor({rows, n}, x.scalar_type());
  with_dtype(x, [&, rows = rows](auto zero) {
    using T = decltype(zero);
    transform_rows(data<T>(x), mutable_data<T>(to), rows, bits);
  });
  return to;
}

Tensor fastfood(const Tensor theta, std::vector<int64_t> flat, int64_t size, double scale) {
  const auto [rows, d] = shape_of(theta, "theta");
  const Keys keys = keys_of(flat);
  check_size(size, d);
  Tensor to = new_tensor({rows, size}, theta.scalar_type());
  with_dtype(theta, [&, rows = rows, d = d](auto zero) {
    using T = decltype(zero);
    for (int64_t row = 0; row < rows; ++row) {
      fastfood_row(keys, data<T>(theta) + row * d, d, static_cast<T>(scale), mutable_data<T>(to) + row * size, size);
    }
  });
  return to;
}

Tensor fastfood_transposed(const Tensor y, std::vector<int64_t> flat, int64_t d, double scale) {
  const auto [rows, size] = shape_of(y, "y");
  const Keys keys = keys_of(flat);
  check_size(size, d);
  Tensor to = new_tensor({rows, d}, y.scalar_type());
  with_dtype(y, [&, rows = rows, size = size](auto zero) {
    using T = decltype(zero);
    for (int64_t row = 0; row < rows; ++row) {
      fastfood_transposed_row(keys, data<T>(y) + row * size, size, static_cast<T>(scale), mutable_data<T>(to) + row * d, d);
    }
  });
  return to;
}

// to = high and low of the sum of squares of 2^bits entries of G: high 2^20 + low.
void energy(Tensor to, std::vector<int64_t> flat, int64_t bits) {
  check(to, "to", ScalarType::Long, {2});
  STD_TORCH_CHECK(bits >= 0 && bits <= kMostBits, "fastfood: 0 to 30 bits expected");
  fastfood_energy(keys_of(flat), bits, mutable_data<int64_t>(to), mutable_data<int64_t>(to) + 1);
}

}  // namespace
}  // namespace mlp_fusion

STABLE_TORCH_LIBRARY_FRAGMENT(fusion_kernels_native, m) {
  m.def("hadamard(Tensor x) -> Tensor");
  m.def("fastfood(Tensor theta, int[] keys, int size, float scale) -> Tensor");
  m.def("fastfood_transposed(Tensor y, int[] keys, int length, float scale) -> Tensor");
  m.def("fastfood_energy(Tensor(a!) to, int[] keys, int bits) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusion_kernels_native, CPU, m) {
  m.impl("hadamard", TORCH_BOX(&mlp_fusion::transform));
  m.impl("fastfood", TORCH_BOX(&mlp_fusion::fastfood));
  m.impl("fastfood_transposed", TORCH_BOX(&mlp_fusion::fastfood_transposed));
  m.impl("fastfood_energy", TORCH_BOX(&mlp_fusion::energy));
}
