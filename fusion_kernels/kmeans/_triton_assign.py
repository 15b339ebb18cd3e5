"""Device code: the nearest centroid of every point, from products that are not stored (see `_triton_gram.py`)."""

import triton
import triton.language as tl


@triton.jit
def _nearest_kernel(
    x_high_ptr,
    x_low_ptr,
    x_scale_ptr,
    x_norm_ptr,
    c_high_ptr,
    c_low_ptr,
    c_scale_ptr,
    c_norm_ptr,
    labels_ptr,
    slack_factor,
    N,
    K,
    depth,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """labels (B, N) int64: nearest of the centroids (B, K, depth) to the points (B, N, depth), both split and scaled.

    One program per BN points of a problem; it walks over the centroids, BK at a time, and keeps the nearest so far.
    Where another one is as near, up to what products can miss, -1 - label is stored: it is to be decided.
    """
    tiles = tl.cdiv(N, BN)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    r = (tl.program_id(0) % tiles) * BN + tl.arange(0, BN)
    # Rows past the end are read from the last one: no masks in the loop, and nothing of them is stored.
    row = b * N + tl.minimum(r, N - 1)
    x_scale = tl.load(x_scale_ptr + row)
    x_norm = tl.load(x_norm_ptr + row)
    nearest = tl.full((BN,), float("inf"), tl.float32)
    second = tl.full((BN,), float("inf"), tl.float32)
    label = tl.zeros((BN,), tl.int32)
    for k in range(0, K, BK):
        c = k + tl.arange(0, BK)
        centroid = b * K + tl.minimum(c, K - 1)
        total = tl.zeros((BN, BK), tl.float32)
        for step in range(0, depth, BD):
            d = step + tl.arange(0, BD)
            x_tile = (row * depth)[:, None] + d[None, :]
            c_tile = (centroid * depth)[None, :] + d[:, None]
            x_high = tl.load(x_high_ptr + x_tile)  # (BN, BD)
            c_high = tl.load(c_high_ptr + c_tile)  # (BD, BK)
            part = tl.zeros((BN, BK), tl.float32)
            part = tl.dot(tl.load(x_low_ptr + x_tile), c_high, part)
            part = tl.dot(x_high, tl.load(c_low_ptr + c_tile), part)
            total += tl.dot(x_high, c_high, part)
        scale = x_scale[:, None] * tl.load(c_scale_ptr + centroid)[None, :]
        distance = tl.load(c_norm_ptr + centroid)[None, :] - 2.0 * (total * scale)  # (BN, BK)
        distance = tl.where((c < K)[None, :], distance, float("inf"))
        least = tl.min(distance, 1)
        first = tl.min(tl.where(distance == least[:, None], c[None, :], K), 1)
        others = tl.min(tl.where(c[None, :] == first[:, None], float("inf"), distance), 1)
        nearer = least < nearest
        second = tl.minimum(tl.minimum(second, others), tl.where(nearer, nearest, least))
        nearest = tl.where(nearer, least, nearest)
        label = tl.where(nearer, first, label)
    # No nearest centroid is longer than point and distance together.
    window = 12.0 * slack_factor * (x_norm + tl.maximum(x_norm + nearest, 0.0))
    label = tl.where(second <= nearest + window, -1 - label, label)
    tl.store(labels_ptr + b * N + r, label.to(tl.int64), mask=r < N)
