"""Device code: centred inner products of all pairs of points, G = (x - m)(x - m)ᵀ, on tensor cores.

Every centred row is scaled by a power of two to a largest entry in [2¹⁴, 2¹⁵) and split into two float16 numbers,
high + low, with 22 significant bits between them. Three products (low·high, high·low, high·high) with float32
accumulators then give nearly float32 inner products. The low parts need no scale of their own, because 2¹⁵ is far above
the smallest float16, so that one accumulator serves all three. Tensor cores truncate when they accumulate, always
towards zero, and so every step of at most 64 columns begins at zero and is added, rounded to nearest, to a float32
total: what truncation can lose does not grow with the number of columns.

Source of the splitting: Ootomo & Yokota 2022, "Recovering single precision accuracy from Tensor Cores".
"""

import triton
import triton.language as tl


@triton.jit
def _total_kernel(value_ptr, total_ptr, N, BLOCK: tl.constexpr):
    """total (B,) = sum of value (B, N), float64; one program per problem, in a fixed order."""
    b = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, N, BLOCK):
        j = first + tl.arange(0, BLOCK)
        total += tl.load(value_ptr + b * N + j, mask=j < N, other=0.0)
    tl.store(total_ptr + b, tl.sum(total, 0))


@triton.jit
def _column_mean_kernel(
    x_ptr, weight_ptr, total_ptr, mean_ptr, N, D, BN: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """mean (B, D) = weighted mean of the rows of x (B, N, D); weight (B, N) and total (B,) are float64."""
    tiles = tl.cdiv(D, BD)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    d = (tl.program_id(0) % tiles) * BD + tl.arange(0, BD)
    total = tl.load(total_ptr + b)
    mean = tl.zeros((BD,), tl.float64)
    for first in range(0, N, BN):
        j = first + tl.arange(0, BN)
        share = tl.load(weight_ptr + b * N + j, mask=j < N, other=0.0) / tl.where(total > 0, total, 1.0)
        mask = (j < N)[:, None] & (d < D)[None, :]
        rows = tl.load(x_ptr + (b * N + j)[:, None] * D + d[None, :], mask=mask, other=0.0)  # (BN, BD)
        mean += tl.sum(share[:, None] * rows.to(tl.float64), 0)
    tl.store(mean_ptr + b * D + d, mean.to(mean_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _power_of_two(exponent):
    """2**exponent as float32, for exponent in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _split_kernel(
    x_ptr, mean_ptr, high_ptr, low_ptr, exponent_ptr, finite_ptr, N, D, depth, SPLIT: tl.constexpr, BD: tl.constexpr
):
    """Centre a row of x (B, N, D) float32, scale it and split it; one program per row.

    high, low (B, N, depth) float16 with zeros beyond D; exponent (B, N): `x - mean = 2**exponent * (high + low)`;
    finite (B, N): 0 where x or mean hold NaN or infinity (the other outputs are then zeros).
    """
    row = tl.program_id(0).to(tl.int64)
    b = row // N
    peak = tl.zeros((BD,), tl.float32)
    bad = tl.zeros((BD,), tl.int32)
    for first in range(0, D, BD):
        d = first + tl.arange(0, BD)
        x = tl.load(x_ptr + row * D + d, mask=d < D, other=0.0)
        # Halves, because the difference of two large numbers may overflow.
        size = tl.abs(0.5 * x - 0.5 * tl.load(mean_ptr + b * D + d, mask=d < D, other=0.0))
        bad |= (size < float("inf")).to(tl.int32) ^ 1
        peak = tl.maximum(peak, size)
    finite = tl.max(bad, 0) == 0
    top = tl.where(finite, tl.max(peak, 0), 0.0)
    exponent = tl.maximum((top.to(tl.int32, bitcast=True) >> 23) - 127, -126)
    # In two steps, because the factor itself may lie outside the range of float32.
    shift = 14 - exponent
    scale = _power_of_two(shift >> 1)
    rest = _power_of_two(shift - (shift >> 1))
    for first in range(0, depth, BD):
        d = first + tl.arange(0, BD)
        x = tl.load(x_ptr + row * D + d, mask=d < D, other=0.0)
        y = (0.5 * x - 0.5 * tl.load(mean_ptr + b * D + d, mask=d < D, other=0.0)) * scale * rest
        y = tl.where(finite, y, 0.0)
        high = y.to(tl.float16)
        tl.store(high_ptr + row * depth + d, high, mask=d < depth)
        if SPLIT:
            tl.store(low_ptr + row * depth + d, (y - high.to(tl.float32)).to(tl.float16), mask=d < depth)
    tl.store(exponent_ptr + row, 1 - shift)
    tl.store(finite_ptr + row, finite.to(tl.int32))


@triton.jit
def _row_norm_kernel(high_ptr, low_ptr, scale_ptr, norm_ptr, depth, SPLIT: tl.constexpr, BD: tl.constexpr):
    """norm (B, n) = scale² |high + low|² of the rows of (B, n, depth); one program per row."""
    row = tl.program_id(0).to(tl.int64)
    norm = tl.zeros((BD,), tl.float64)
    for first in range(0, depth, BD):
        d = first + tl.arange(0, BD)
        y = tl.load(high_ptr + row * depth + d, mask=d < depth, other=0.0).to(tl.float32)
        if SPLIT:
            y += tl.load(low_ptr + row * depth + d, mask=d < depth, other=0.0).to(tl.float32)
        norm += y.to(tl.float64) * y.to(tl.float64)
    scale = tl.load(scale_ptr + row)
    tl.store(norm_ptr + row, tl.sum(norm, 0).to(tl.float32) * scale * scale)


@triton.jit
def _tile_in_triangle(t):
    """Row and column of tile t of those on and below the diagonal, row by row."""
    i = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The square root may be off by one unit either way.
    i = tl.where(i * (i + 1) // 2 > t, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)
    return i, t - i * (i + 1) // 2


@triton.jit
def _tile_in_bands(t, side):
    """Row and column of tile t of a triangle of `side` rows, in bands of 8 rows, each column by column.

    Programs that run together then share both operands in the second-level cache. As `tile_at` of csrc/cuda/layout.h.
    """
    BAND: tl.constexpr = 8
    row, _ = _tile_in_triangle(t)
    band = row // BAND * BAND
    height = tl.minimum(BAND, side - band)
    within = t - band * (band + 1) // 2
    corner_row, corner_column = _tile_in_triangle(tl.maximum(within - band * height, 0))
    left = within < band * height
    i = tl.where(left, within % height, corner_row)
    k = tl.where(left, within // height, band + corner_column)
    return band + i, k


@triton.jit
def _gram_kernel(
    a_high_ptr,
    a_low_ptr,
    a_scale_ptr,
    b_high_ptr,
    b_low_ptr,
    b_scale_ptr,
    out_ptr,
    M,
    N,
    depth,
    stride,
    SYMMETRIC: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """out (B, M, stride)[:, :, :N] = scaled products of the rows of a (B, M, depth) with those of b (B, N, depth).

    One program per tile, problem-major. SYMMETRIC (a is b, M == N, BM == BN): only tiles on and below the diagonal are
    computed and every entry above it is a copy of the one below. depth is a multiple of BD.
    """
    pid = tl.program_id(0)
    side = tl.cdiv(N, BN)
    if SYMMETRIC:
        tiles = side * (side + 1) // 2
        i, k = _tile_in_bands(pid % tiles, side)
    else:
        tiles = tl.cdiv(M, BM) * side
        i = (pid % tiles) // side
        k = pid % side
    b = (pid // tiles).to(tl.int64)
    r = i * BM + tl.arange(0, BM)
    c = k * BN + tl.arange(0, BN)
    # Rows past the end are read from the last one: no masks in the loop, and nothing of them is stored.
    a_row = (b * M + tl.minimum(r, M - 1)) * depth
    b_row = (b * N + tl.minimum(c, N - 1)) * depth

    total = tl.zeros((BM, BN), tl.float32)
    for step in range(0, depth, BD):
        d = step + tl.arange(0, BD)
        a_tile = a_row[:, None] + d[None, :]
        b_tile = b_row[None, :] + d[:, None]
        a_high = tl.load(a_high_ptr + a_tile)  # (BM, BD)
        b_high = tl.load(b_high_ptr + b_tile)  # (BD, BN)
        part = tl.zeros((BM, BN), tl.float32)
        if SPLIT:
            part = tl.dot(tl.load(a_low_ptr + a_tile), b_high, part)
            part = tl.dot(a_high, tl.load(b_low_ptr + b_tile), part)
        total += tl.dot(a_high, b_high, part)
    a_scale = tl.load(a_scale_ptr + b * M + r, mask=r < M, other=0.0)
    b_scale = tl.load(b_scale_ptr + b * N + c, mask=c < N, other=0.0)
    total = total * a_scale[:, None] * b_scale[None, :]

    mask = (r < M)[:, None] & (c < N)[None, :]
    out = out_ptr + b * M * stride
    r = r.to(tl.int64)
    c = c.to(tl.int64)
    if SYMMETRIC:
        tl.store(out + r[:, None] * stride + c[None, :], total, mask=mask & (r[:, None] >= c[None, :]))
        mirrored = (r[None, :] > c[:, None]) & tl.trans(mask)
        tl.store(out + c[:, None] * stride + r[None, :], tl.trans(total), mask=mirrored)
    else:
        tl.store(out + r[:, None] * stride + c[None, :], total, mask=mask)
