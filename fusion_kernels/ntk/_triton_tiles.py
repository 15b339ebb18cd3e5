"""Device code: tiles of a tangent kernel, all products of a tile together,

    K = constant + H1 H2ᵀ + (X1 X2ᵀ + bias) ∘ (S1 S2ᵀ)

of two operands, each the columns X | S | H of its rows. One program computes one tile with two accumulators: X1 X2ᵀ in
the first, S1 S2ᵀ in the second, which is then multiplied by the first and goes on to H1 H2ᵀ. Nothing of the size of K
is stored but K. Tensor cores truncate when they accumulate, always towards zero, and so every step of at most 64
columns begins at zero and is added, rounded to nearest, to a total: what truncation can lose does not grow with the
number of columns. The order of a sum depends on the number of columns and on the tile, never on the launch.
"""

import triton
import triton.language as tl

from fusion_kernels.kmeans._triton_gram import _tile_in_bands


@triton.jit
def _with_products(
    total, left, right, begin, end, left_plane, right_plane, PLANES: tl.constexpr, PRECISION: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """total (BM, BN) + products of the rows at left (BM, 1) with those at right (1, BN), over columns begin to end.

    Of two planes, high and low parts, the product of the low ones is left out: it is as small as what splitting lost.
    """
    for step in range(begin, end, BD):
        d = step + tl.arange(0, BD)
        a = left + d[None, :]
        b = right + d[:, None]
        a_high = tl.load(a)  # (BM, BD)
        b_high = tl.load(b)  # (BD, BN)
        part = tl.zeros_like(total)
        if PLANES == 2:
            part = tl.dot(tl.load(a + left_plane), b_high, part, input_precision=PRECISION, out_dtype=total.dtype)
            part = tl.dot(a_high, tl.load(b + right_plane), part, input_precision=PRECISION, out_dtype=total.dtype)
        total += tl.dot(a_high, b_high, part, input_precision=PRECISION, out_dtype=total.dtype)
    return total


@triton.jit(do_not_specialize=["M", "N", "stride"])
def _ntk_tile_kernel(
    left_ptr, right_ptr, constant_ptr, out_ptr, M, N, inputs, slopes, hidden, left_plane, right_plane, stride, bias,
    ACCUMULATE: tl.constexpr, SYMMETRIC: tl.constexpr, PLANES: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One tile of out (M, N), whose rows are contiguous and `stride` apart; one program per tile.

    left (PLANES, M, inputs + slopes + hidden) and right (PLANES, N, ...) have planes `left_plane` and `right_plane`
    apart; each range of columns is a multiple of BD, or empty. constant (1,). ACCUMULATE: add to what out holds.
    SYMMETRIC (left is right, BM == BN): only tiles on and below the diagonal are computed, of what out holds only
    entries on and below it are read, and every entry above it is a copy of the one below.
    """
    pid = tl.program_id(0)
    side = tl.cdiv(N, BN)
    if SYMMETRIC:
        i, k = _tile_in_bands(pid, side)
    else:
        i = pid // side
        k = pid % side
    r = i * BM + tl.arange(0, BM)
    c = k * BN + tl.arange(0, BN)
    hidden_from = inputs + slopes
    columns = hidden_from + hidden
    # Rows past the end are read from the last one: no masks in the loop, and nothing of them is stored.
    left = left_ptr + tl.minimum(r, M - 1).to(tl.int64)[:, None] * columns
    right = right_ptr + tl.minimum(c, N - 1).to(tl.int64)[None, :] * columns

    none = tl.zeros((BM, BN), out_ptr.dtype.element_ty)
    over = _with_products(none, left, right, 0, inputs, left_plane, right_plane, PLANES, PRECISION, BD)
    total = _with_products(none, left, right, inputs, hidden_from, left_plane, right_plane, PLANES, PRECISION, BD)
    total = (over + bias) * total
    total = _with_products(total, left, right, hidden_from, columns, left_plane, right_plane, PLANES, PRECISION, BD)
    total += tl.load(constant_ptr)

    mask = (r < M)[:, None] & (c < N)[None, :]
    if SYMMETRIC:
        mask = mask & (r[:, None] >= c[None, :])
    at = out_ptr + r.to(tl.int64)[:, None] * stride + c[None, :]
    if ACCUMULATE:
        total += tl.load(at, mask=mask, other=0.0)
    tl.store(at, total, mask=mask)
    if SYMMETRIC:
        mirrored = (r[None, :] > c[:, None]) & (r < M)[None, :]
        tl.store(out_ptr + c.to(tl.int64)[:, None] * stride + r[None, :], tl.trans(total), mask=mirrored)
