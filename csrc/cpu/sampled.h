// Entries of gᵀ x that are asked for, without the others: the formulas of fusion_kernels/sparse/reference.py.
#pragma once

#include <cstdint>

#include "mlp.h"

namespace mlp_fusion {

// out[e] = sum over t of g[t, rows[e]] x[t, columns[e]] for `count` entries, whose rows do not fall. Sums are in float, of
// double in double, and each is added up in an order that depends on the number of tokens alone.
template <class T>
void sampled_product(const Matrix<T>& g, const Matrix<T>& x, const int32_t* rows, const int32_t* columns, int64_t count,
                     Wide<T>* out);

}  // namespace mlp_fusion
