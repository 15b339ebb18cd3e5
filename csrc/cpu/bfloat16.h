// Gram matrices of points that bfloat16 holds exactly, as it does those of most checkpoints: in half of the time that
// float32 takes, and as accurate, since products of such numbers are exact in float32, in which they are summed.
#pragma once

#include <cstdint>

namespace mlp_fusion {

// Whether this processor multiplies pairs of bfloat16 and adds them in float32.
bool has_bfloat16_products();

// The rows and columns that `pack_bfloat16` makes of n and d.
int64_t packed_rows(int64_t n);
int64_t packed_columns(int64_t d);

// out (packed_columns(d)) = one row x (d) in bfloat16, with zeros behind; returns whether every number is the same.
bool pack_bfloat16(const float* x, int64_t d, uint16_t* out);

// Rows [begin, end) of g = x xᵀ up to their own column, for packed x of d columns; `begin` is a multiple of
// kPanelRows, `end` one or the number of rows n. Every sum has one order. Only where has_bfloat16_products().
constexpr int64_t kPanelRows = 96;
void gram_rows_bfloat16(const uint16_t* x, int64_t d, int64_t begin, int64_t end, int64_t n, float* g,
                        int64_t stride);

}  // namespace mlp_fusion
