"""Device code: from labels back to coordinates. Sums are float64, whatever the points are."""

import triton
import triton.language as tl


@triton.jit
def _means_kernel(
    x_ptr, weight_ptr, begin_ptr, length_ptr, members_ptr, mass_ptr, centroid_ptr, N, D, K,
    U: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """centroid (B, K, D) = weighted means of the rows of x (B, N, D); clusters without members keep theirs."""
    tiles = tl.cdiv(D, BD)
    cluster = (tl.program_id(0) // tiles).to(tl.int64)
    b = cluster // K
    d = (tl.program_id(0) % tiles) * BD + tl.arange(0, BD)
    begin = tl.load(begin_ptr + cluster)
    length = tl.load(length_ptr + cluster)
    if length > 0:
        mass = tl.load(mass_ptr + cluster)
        mean = tl.zeros((BD,), tl.float64)
        for first in range(0, length, U):
            k = first + tl.arange(0, U)
            j = tl.load(members_ptr + b * N + begin + k, mask=k < length, other=0)
            # Shares first: the mean of a single point is then exactly that point.
            share = tl.load(weight_ptr + b * N + j, mask=k < length, other=0.0) / mass
            mask = (k < length)[:, None] & (d < D)[None, :]
            rows = tl.load(x_ptr + (b * N + j)[:, None] * D + d[None, :], mask=mask, other=0.0)  # (U, BD)
            mean += tl.sum(share[:, None] * rows.to(tl.float64), 0)
        tl.store(centroid_ptr + cluster * D + d, mean.to(centroid_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _point_cost_kernel(x_ptr, weight_ptr, labels_ptr, centroid_ptr, cost_ptr, N, D, K, BD: tl.constexpr):
    """cost (B, N) float64 = weight times squared distance to the label's centroid; one program per point."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    weight = tl.load(weight_ptr + row)
    total = tl.zeros((BD,), tl.float64)
    if (label >= 0) & (weight > 0):
        at = (row // N * K + label) * D
        for first in range(0, D, BD):
            d = first + tl.arange(0, BD)
            x = tl.load(x_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float64)
            difference = x - tl.load(centroid_ptr + at + d, mask=d < D, other=0.0).to(tl.float64)
            total += difference * difference
    tl.store(cost_ptr + row, weight * tl.sum(total, 0))


@triton.jit
def _partition_cost_kernel(
    products_ptr, norms_ptr, diagonal_ptr, weight_ptr, labels_ptr, cost_ptr, N, K, stride, BLOCK: tl.constexpr
):
    """cost (B,) float64 = inertia of a run, from its products: what the best of several runs is chosen by."""
    b = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, N, BLOCK):
        j = first + tl.arange(0, BLOCK)
        label = tl.load(labels_ptr + b * N + j, mask=j < N, other=-1)
        active = label >= 0
        diagonal = tl.load(diagonal_ptr + b * N + j, mask=active, other=0.0)
        norm = tl.load(norms_ptr + b * K + label, mask=active, other=0.0)
        product = tl.load(products_ptr + (b * K + label) * stride + j, mask=active, other=0.0)
        distance = (diagonal + (norm - 2.0 * product)).to(tl.float64)
        total += tl.load(weight_ptr + b * N + j, mask=active, other=0.0) * distance
    tl.store(cost_ptr + b, tl.sum(total, 0))
