"""Device code: activations in one pass over the hidden tensors, sums of columns, and weight gradients of experts."""

import triton
import triton.language as tl

from fusion_kernels.mlp._triton_tiles import activation, gated, load, short, through_up


@triton.jit
def _block(C, BR: tl.constexpr, BC: tl.constexpr):
    """Rows and columns (int64) of a program's block (BR, BC)."""
    across = tl.cdiv(C, BC)
    r = (tl.program_id(0) // across).to(tl.int64) * BR + tl.arange(0, BR)
    c = (tl.program_id(0) % across).to(tl.int64) * BC + tl.arange(0, BC)
    return r[:, None], c[None, :]


@triton.jit(do_not_specialize=["R"])
def _act_kernel(
    z_ptr, up_ptr, a_ptr, R, C, z_stride, up_stride, ACTIVATION: tl.constexpr, GATE: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """a (R, C) = activation(z), times `up` unless it is None, as GATE limits both."""
    r, c = _block(C, BR, BC)
    mask = (r < R) & (c < C)
    z = tl.load(z_ptr + r * z_stride + c, mask=mask, other=0.0).to(tl.float32)
    if up_ptr is None:
        a, _ = activation(z, ACTIVATION, short(a_ptr))
    else:
        up = tl.load(up_ptr + r * up_stride + c, mask=mask, other=0.0).to(tl.float32)
        a, _, up = gated(z, up, ACTIVATION, GATE, short(a_ptr))
        a *= up
    tl.store(a_ptr + r * C + c, a.to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R"])
def _act_backward_kernel(
    da_ptr,
    z_ptr,
    up_ptr,
    dz_ptr,
    dup_ptr,
    a_ptr,
    R,
    C,
    da_stride,
    z_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """dz (R, C) = da * activation'(z) and a = activation(z); with `up`, those of activation(z) * up, and dup."""
    r, c = _block(C, BR, BC)
    mask = (r < R) & (c < C)
    at = r * C + c
    da = tl.load(da_ptr + r * da_stride + c, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + r * z_stride + c, mask=mask, other=0.0).to(tl.float32)
    if up_ptr is None:
        a, slope = activation(z, ACTIVATION, short(dz_ptr))
        dz = da * slope
    else:
        raw = tl.load(up_ptr + r * up_stride + c, mask=mask, other=0.0).to(tl.float32)
        a, slope, up = gated(z, raw, ACTIVATION, GATE, short(dz_ptr))
        tl.store(dup_ptr + at, through_up(da * a, raw, GATE).to(dup_ptr.dtype.element_ty), mask=mask)
        dz = da * slope * up
        a *= up
    tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    if a_ptr is not None:
        tl.store(a_ptr + at, a.to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R"])
def _column_sums_kernel(
    x_ptr, rows_ptr, out_ptr, offsets_ptr, R, C, E, stride, TILE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    BE: tl.constexpr,
):  # fmt: skip
    """out (E, C) float32 = sums of the rows of x (R, C) that belong to each expert, in a fixed order.

    A row stands for a tile of TILE tokens, as in `rows_of`: for tokens themselves TILE is 1. Without offsets E is 1.
    Rows of x lie where `rows_ptr` says, if it is there.
    """
    across = tl.cdiv(C, BC)
    expert = tl.program_id(0) // across
    c = (tl.program_id(0) % across) * BC + tl.arange(0, BC)
    if offsets_ptr is None:
        begin = 0
        end = R
    else:
        e = tl.arange(0, BE)
        low = tl.load(offsets_ptr + e, mask=e < E, other=0)
        tiles = tl.cdiv(tl.load(offsets_ptr + e + 1, mask=e < E, other=0) - low, TILE)
        # Tiles are numbered from 0, tokens from the first offset.
        begin = tl.sum(tl.where(e < expert, tiles, 0), 0) + (tl.load(offsets_ptr) if TILE == 1 else 0)
        end = begin + tl.sum(tl.where(e == expert, tiles, 0), 0)
    total = tl.zeros((BR, BC), tl.float32)
    for first in range(begin, end, BR):
        r = (first + tl.arange(0, BR)).to(tl.int64)
        mask = (r < end)[:, None] & (c < C)[None, :]
        if rows_ptr is not None:
            r = tl.load(rows_ptr + r, mask=r < end, other=0)
        total += tl.load(x_ptr + r[:, None] * stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + expert.to(tl.int64) * C + c, tl.sum(total, 0), mask=c < C)


@triton.jit
def _expert_gradient_kernel(
    a_ptr,
    a_rows_ptr,
    b_ptr,
    b_rows_ptr,
    out_ptr,
    offsets_ptr,
    M,
    N,
    a_stride,
    b_stride,
    PRECISION: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out (E, M, N) = aᵀb over the rows of each expert, a (T, M), b (T, N); one program per tile, expert-major.

    Rows of a and of b lie where `a_rows_ptr` and `b_rows_ptr` say, if they are there.
    """
    tiles_n = tl.cdiv(N, BN)
    tiles = tl.cdiv(M, BM) * tiles_n
    expert = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    m = (tile // tiles_n) * BM + tl.arange(0, BM)
    n = (tile % tiles_n) * BN + tl.arange(0, BN)
    t = tl.arange(0, BK)
    begin = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    rows = begin.to(tl.int64) + t
    a = a_ptr + rows[None, :] * a_stride + m[:, None]
    b = b_ptr + rows[:, None] * b_stride + n[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(begin, end, BK):
        inside = t < end - first
        if a_rows_ptr is not None:
            a = a_ptr + tl.load(a_rows_ptr + rows, mask=inside, other=0)[None, :] * a_stride + m[:, None]
        if b_rows_ptr is not None:
            b = b_ptr + tl.load(b_rows_ptr + rows, mask=inside, other=0)[:, None] * b_stride + n[None, :]
        left = load(a, (m < M)[:, None], inside[None, :], EVEN_M, False)
        right = load(b, inside[:, None], (n < N)[None, :], False, EVEN_N)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
        rows += BK
        if a_rows_ptr is None:
            a += BK * a_stride
        if b_rows_ptr is None:
            b += BK * b_stride
    at = (expert.to(tl.int64) * M + m)[:, None] * N + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)
