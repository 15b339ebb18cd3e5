"""Device code: products with a weight whose epilogue is the activation of an MLP, or the derivative of it.

One program per tile (BM, BN) of the hidden activations; the hidden tensors are contiguous. Biases, saved tensors and
second outputs that are not wanted are None. Expert e's weight begins `w_stride_e` entries after the one before. Rows of
x or dy lie where `rows_ptr` says, if it is there; those of what is hidden lie as experts own them.

What depends on the number of tokens only bounds loops and masks here: no kernel is compiled again for another number.
"""

import triton
import triton.language as tl

from fusion_kernels.mlp._triton_tiles import (
    accumulate,
    activation,
    gated,
    halves,
    load,
    lying,
    rows_of,
    short,
    stored,
    through_up,
    tile_of,
)


@triton.jit
def _place(acc, first, end, first_n, N, EVEN_N: tl.constexpr):
    """Rows (BM, 1) int64, columns (BN,) and the mask of a tile."""
    m = first + tl.arange(0, acc.shape[0])
    n = first_n + tl.arange(0, acc.shape[1])
    mask = (m < end)[:, None] if EVEN_N else (m < end)[:, None] & (n < N)[None, :]
    return m.to(tl.int64)[:, None], n, mask


@triton.jit
def _halves(tiles):
    """The left halves of one or two tiles, and the right ones."""
    left, right = halves(tiles[0])
    if len(tiles) == 1:
        lefts = (left,)
        rights = (right,)
    else:
        other_left, other_right = halves(tiles[1])
        lefts = (left, other_left)
        rights = (right, other_right)
    return lefts, rights


@triton.jit
def _store(
    tiles, pointers, strides, owner, first, end, first_n, N,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, GATE: tl.constexpr, EVEN_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Hand the sums of a tile to an epilogue in PARTS parts of its columns, which take fewer registers.

    tiles: a tuple of one or two (BM, BN), which belong to the rows `first` to `end` and the columns from `first_n`.
    pointers, strides, owner: what the epilogue says they are.
    """
    if PARTS > 1:
        HALF: tl.constexpr = tiles[0].shape[1] // 2
        left, right = _halves(tiles)
        MORE: tl.constexpr = PARTS // 2
        _store(left, pointers, strides, owner, first, end, first_n, N, EPILOGUE, ACTIVATION, GATE, EVEN_N, MORE)
        _store(right, pointers, strides, owner, first, end, first_n + HALF, N, EPILOGUE, ACTIVATION, GATE, EVEN_N, MORE)
    else:
        rows, n, mask = _place(tiles[0], first, end, first_n, N, EVEN_N)
        EPILOGUE(tiles, pointers, strides, owner, rows, n, mask, end, N, ACTIVATION, GATE)


@triton.jit
def _act(tiles, pointers, strides, expert, rows, n, mask, end, N, ACTIVATION: tl.constexpr, GATE: tl.constexpr):
    """z = acc + bias, and a = activation(z). pointers: bias, z, a, places of a's rows; strides: none."""
    bias_ptr, z_ptr, a_ptr, places_ptr = pointers
    acc = tiles[0]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + expert * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    z = stored(acc, a_ptr)
    a, _ = activation(z, ACTIVATION, short(a_ptr))
    at = rows * N + n[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), mask=mask)
    if places_ptr is not None:
        at = tl.load(places_ptr + rows, mask=rows < end, other=0) * N + n[None, :]
    tl.store(a_ptr + at, a.to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _act_backward(
    tiles, pointers, strides, tile_m, rows, n, mask, end, N, ACTIVATION: tl.constexpr, GATE: tl.constexpr
):
    """dz = acc * activation'(z), a = activation(z), and sums of dz. pointers: z, dz, a, partial; strides: of z."""
    z_ptr, dz_ptr, a_ptr, partial_ptr = pointers
    z = tl.load(z_ptr + rows * strides[0] + n[None, :], mask=mask, other=0.0).to(tl.float32)
    a, slope = activation(z, ACTIVATION, short(dz_ptr))
    dz = tiles[0] * slope
    at = rows * N + n[None, :]
    tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    if a_ptr is not None:
        tl.store(a_ptr + at, a.to(a_ptr.dtype.element_ty), mask=mask)
    if partial_ptr is not None:
        total = tl.sum(tl.where(rows < end, dz, 0.0), 0)
        tl.store(partial_ptr + tile_m.to(tl.int64) * N + n, total, mask=n < N)


@triton.jit
def _glu(tiles, pointers, strides, expert, rows, n, mask, end, N, ACTIVATION: tl.constexpr, GATE: tl.constexpr):
    """zg, zu = the tiles + biases, a = activation(zg) * zu. pointers: both biases, zg, zu, a; strides: none."""
    gate_bias_ptr, up_bias_ptr, zg_ptr, zu_ptr, a_ptr = pointers
    zg, zu = tiles
    if gate_bias_ptr is not None:
        zg += tl.load(gate_bias_ptr + expert * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if up_bias_ptr is not None:
        zu += tl.load(up_bias_ptr + expert * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    zg = stored(zg, a_ptr)
    zu = stored(zu, a_ptr)
    at = rows * N + n[None, :]
    if zg_ptr is not None:
        tl.store(zg_ptr + at, zg.to(zg_ptr.dtype.element_ty), mask=mask)
        tl.store(zu_ptr + at, zu.to(zu_ptr.dtype.element_ty), mask=mask)
    value, _, up = gated(zg, zu, ACTIVATION, GATE, short(a_ptr))
    tl.store(a_ptr + at, (value * up).to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _glu_backward(
    tiles, pointers, strides, tile_m, rows, n, mask, end, N, ACTIVATION: tl.constexpr, GATE: tl.constexpr
):
    """dzg, dzu and a of da, the tile, and sums. pointers: zg, zu, dzg, dzu, a, both partials; strides: of zg and zu."""
    zg_ptr, zu_ptr, dzg_ptr, dzu_ptr, a_ptr, gate_partial_ptr, up_partial_ptr = pointers
    da = tiles[0]
    zg = tl.load(zg_ptr + rows * strides[0] + n[None, :], mask=mask, other=0.0).to(tl.float32)
    zu = tl.load(zu_ptr + rows * strides[1] + n[None, :], mask=mask, other=0.0).to(tl.float32)
    value, slope, up = gated(zg, zu, ACTIVATION, GATE, short(dzg_ptr))
    dzg = da * up * slope
    dzu = through_up(da * value, zu, GATE)
    at = rows * N + n[None, :]
    tl.store(dzg_ptr + at, dzg.to(dzg_ptr.dtype.element_ty), mask=mask)
    tl.store(dzu_ptr + at, dzu.to(dzu_ptr.dtype.element_ty), mask=mask)
    if a_ptr is not None:
        tl.store(a_ptr + at, (value * up).to(a_ptr.dtype.element_ty), mask=mask)
    if gate_partial_ptr is not None:
        at_partial = tile_m.to(tl.int64) * N + n
        tl.store(gate_partial_ptr + at_partial, tl.sum(tl.where(rows < end, dzg, 0.0), 0), mask=n < N)
        tl.store(up_partial_ptr + at_partial, tl.sum(tl.where(rows < end, dzu, 0.0), 0), mask=n < N)


@triton.jit(do_not_specialize=["T", "tiles_m"])
def _linear_act_kernel(
    x_ptr,
    rows_ptr,
    w_ptr,
    x2_ptr,
    w2_ptr,
    bias_ptr,
    z_ptr,
    a_ptr,
    places_ptr,
    map_ptr,
    T,
    N,
    K,
    tiles_m,
    x_stride,
    w_stride_e,
    w_stride_n,
    w_stride_k,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):
    """z (T, N) = x (T, K) · w + bias, and a = activation(z). With x2 and w2, of the same strides, z gains x2 · w2.

    Rows of a are written to `places_ptr`'s, if it is there.
    """
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tl.cdiv(N, BN), GROUP)
    expert, first, end = rows_of(tile_m, map_ptr, T, BM)
    if first < end:
        n = tile_n * BN + tl.arange(0, BN)
        rows = lying(first, end, rows_ptr, BM)
        acc = tl.zeros((BM, BN), tl.float32)
        acc = accumulate(
            acc, x_ptr, w_ptr + expert * w_stride_e, rows, n, N, K,
            x_stride, w_stride_n, w_stride_k, PRECISION, EVEN_N, EVEN_K, BK,
        )  # fmt: skip
        if x2_ptr is not None:
            acc = accumulate(
                acc, x2_ptr, w2_ptr + expert * w_stride_e, rows, n, N, K,
                x_stride, w_stride_n, w_stride_k, PRECISION, EVEN_N, EVEN_K, BK,
            )  # fmt: skip
        _store(
            (acc,), (bias_ptr, z_ptr, a_ptr, places_ptr), (), expert, first, end, tile_n * BN, N,
            _act, ACTIVATION, None, EVEN_N, PARTS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "tiles_m"])
def _linear_act_backward_kernel(
    dy_ptr,
    rows_ptr,
    w_ptr,
    z_ptr,
    dz_ptr,
    a_ptr,
    partial_ptr,
    map_ptr,
    T,
    N,
    K,
    tiles_m,
    dy_stride,
    w_stride_e,
    w_stride_n,
    w_stride_k,
    z_stride,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):
    """dz (T, N) = (dy (T, K) · w) * activation'(z), a = activation(z); partial (tiles_m, N): sums of dz over a tile."""
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tl.cdiv(N, BN), GROUP)
    expert, first, end = rows_of(tile_m, map_ptr, T, BM)
    if first < end:
        n = tile_n * BN + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), tl.float32)
        acc = accumulate(
            acc, dy_ptr, w_ptr + expert * w_stride_e, lying(first, end, rows_ptr, BM), n, N, K,
            dy_stride, w_stride_n, w_stride_k, PRECISION, EVEN_N, EVEN_K, BK,
        )  # fmt: skip
        _store(
            (acc,), (z_ptr, dz_ptr, a_ptr, partial_ptr), (z_stride,), tile_m, first, end, tile_n * BN, N,
            _act_backward, ACTIVATION, None, EVEN_N, PARTS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "tiles_m"])
def _linear_glu_kernel(
    x_ptr,
    rows_ptr,
    gate_ptr,
    up_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    zg_ptr,
    zu_ptr,
    a_ptr,
    map_ptr,
    T,
    N,
    K,
    tiles_m,
    x_stride,
    w_stride_e,
    w_stride_n,
    w_stride_k,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):
    """zg = x · gate + bias, zu = x · up + bias, a = activation(zg) * zu, all (T, N); gate and up have equal strides."""
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tl.cdiv(N, BN), GROUP)
    expert, first, end = rows_of(tile_m, map_ptr, T, BM)
    if first < end:
        n = tile_n * BN + tl.arange(0, BN)
        k = tl.arange(0, BK)
        # As in `accumulate`, with one tile of x for both products.
        x = x_ptr + lying(first, end, rows_ptr, BM)[:, None] * x_stride + k[None, :]
        at_w = expert * w_stride_e + n.to(tl.int64)[None, :] * w_stride_n + k.to(tl.int64)[:, None] * w_stride_k
        gate = gate_ptr + at_w
        up = up_ptr + at_w
        zg = tl.zeros((BM, BN), tl.float32)
        zu = tl.zeros((BM, BN), tl.float32)
        for start in range(0, K, BK):
            inside = k < K - start
            left = load(x, None, inside[None, :], True, EVEN_K)
            to_gate = load(gate, inside[:, None], (n < N)[None, :], EVEN_K, EVEN_N)
            to_up = load(up, inside[:, None], (n < N)[None, :], EVEN_K, EVEN_N)
            zg = tl.dot(left, to_gate, zg, input_precision=PRECISION)
            zu = tl.dot(left, to_up, zu, input_precision=PRECISION)
            x += BK
            gate += BK * w_stride_k
            up += BK * w_stride_k
        _store(
            (zg, zu), (gate_bias_ptr, up_bias_ptr, zg_ptr, zu_ptr, a_ptr), (), expert, first, end, tile_n * BN, N,
            _glu, ACTIVATION, GATE, EVEN_N, PARTS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "tiles_m"])
def _linear_glu_backward_kernel(
    dy_ptr,
    rows_ptr,
    w_ptr,
    zg_ptr,
    zu_ptr,
    dzg_ptr,
    dzu_ptr,
    a_ptr,
    gate_partial_ptr,
    up_partial_ptr,
    map_ptr,
    T,
    N,
    K,
    tiles_m,
    dy_stride,
    w_stride_e,
    w_stride_n,
    w_stride_k,
    zg_stride,
    zu_stride,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):
    """da = dy (T, K) · w; dzg = da * zu * activation'(zg), dzu = da * activation(zg), a = activation(zg) * zu."""
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tl.cdiv(N, BN), GROUP)
    expert, first, end = rows_of(tile_m, map_ptr, T, BM)
    if first < end:
        n = tile_n * BN + tl.arange(0, BN)
        da = tl.zeros((BM, BN), tl.float32)
        da = accumulate(
            da, dy_ptr, w_ptr + expert * w_stride_e, lying(first, end, rows_ptr, BM), n, N, K,
            dy_stride, w_stride_n, w_stride_k, PRECISION, EVEN_N, EVEN_K, BK,
        )  # fmt: skip
        _store(
            (da,), (zg_ptr, zu_ptr, dzg_ptr, dzu_ptr, a_ptr, gate_partial_ptr, up_partial_ptr), (zg_stride, zu_stride),
            tile_m, first, end, tile_n * BN, N, _glu_backward, ACTIVATION, GATE, EVEN_N, PARTS,
        )  # fmt: skip
