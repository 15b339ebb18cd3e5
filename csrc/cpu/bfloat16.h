// Gram matrices of points that bfloat16 holds exactly, as it does those of most checkpoints: in half of the time that
// float32 takes, and as accurate, since products of such numbers are exact in float32, in which they are summed.
#pragma once

#include <cstdint>

namespace mlp_fusion {

// Points that are packed together: as many as a vector has sums.
constexpr int64_t kPackedPoints = 16;

// Whether this processor multiplies pairs of bfloat16 and adds them in float32.
bool has_bfloat16_products();

// The pairs of numbers of a packed point, and the points, that d numbers of n points become.
int64_t packed_pairs(int64_t d);
int64_t packed_points(int64_t n);

// Packs `count` points (d), up to kPackedPoints of them, the others as zeros: out (packed_pairs(d), kPackedPoints) holds
// each pair of numbers of all points side by side. Returns whether bfloat16 holds every number.
bool pack_bfloat16(const float* x, int64_t count, int64_t d, uint32_t* out);
// The same of numbers that are bfloat16.
bool pack_bfloat16(const uint16_t* x, int64_t count, int64_t d, uint32_t* out);

// Rows [begin, end) of g += factor x xᵀ up to their own column, for packed x (packed_points(n), d); what stands behind
// that column is undefined afterwards. `begin` is a multiple of kPanelRows; rows of g are `stride` apart, at least n
// rounded up to kPackedPoints. Every sum has one order. Only where has_bfloat16_products().
constexpr int64_t kPanelRows = 96;
void add_bfloat16_products(const uint32_t* x, int64_t d, int64_t begin, int64_t end, int64_t n, float factor, float* g,
                           int64_t stride);

}  // namespace mlp_fusion
