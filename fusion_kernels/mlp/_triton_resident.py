"""Device code: the forward pass of an MLP whose hidden activations never leave the chip."""

import triton
import triton.language as tl

from fusion_kernels.mlp._triton_tiles import activation, gated, load, short, stored


@triton.jit
def _hidden(z, up, bias_ptr, up_bias_ptr, j, h, like, ACTIVATION: tl.constexpr, GATE: tl.constexpr):
    """Activations (BM, BH) of the neurons j, in the dtype of `like`; `up` is None where there is no gate."""
    if bias_ptr is not None:
        z += tl.load(bias_ptr + j, mask=j < h, other=0.0).to(tl.float32)[None, :]
    if up is None:
        a, _ = activation(stored(z, like), ACTIVATION, short(like))
    else:
        if up_bias_ptr is not None:
            up += tl.load(up_bias_ptr + j, mask=j < h, other=0.0).to(tl.float32)[None, :]
        a, _, up = gated(stored(z, like), stored(up, like), ACTIVATION, GATE, short(like))
        a *= up
    return a.to(like.dtype.element_ty)


@triton.jit
def _add(z, tile, w, inside, j, h, PRECISION: tl.constexpr, EVEN_D: tl.constexpr, EVEN_H: tl.constexpr):
    """z (BM, H) + tile (BM, BK) · the weights at w (BK, H) of the neurons j (H,)."""
    weights = load(w, inside[:, None], (j < h)[None, :], EVEN_D, EVEN_H)
    return tl.dot(tile, weights, z, input_precision=PRECISION)


@triton.jit(do_not_specialize=["T"])
def _resident_kernel(
    x_ptr,
    w_ptr,
    up_ptr,
    bias_ptr,
    up_bias_ptr,
    out_w_ptr,
    out_bias_ptr,
    y_ptr,
    T,
    h,
    d,
    O,  # noqa: E741
    x_stride,
    w_stride,
    up_stride,
    out_w_stride,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_H: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_O: tl.constexpr,
    BM: tl.constexpr,
    H0: tl.constexpr,
    H1: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
):
    """y (T, O) = activation(x (T, d) wᵀ + bias) out_wᵀ + out_bias, w (h, d), out_w (O, h); one program per BM tokens.

    With `up` (h, d) the activations are multiplied by x upᵀ + up_bias. The neurons are held in two parts of H0 and H1
    (or none), powers of two with H0 + H1 >= h, so that 192 = 128 + 64 costs no padding.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    j0 = tl.arange(0, H0)
    # Rows past the end are read from the last one.
    x = x_ptr + tl.minimum(m, T - 1).to(tl.int64)[:, None] * x_stride + k[None, :]
    z0 = tl.zeros((BM, H0), tl.float32)
    w0 = w_ptr + j0[None, :] * w_stride + k[:, None]
    u0, u1 = None, None
    if up_ptr is not None:
        u0 = tl.zeros((BM, H0), tl.float32)
        up0 = up_ptr + j0[None, :] * up_stride + k[:, None]
    if H1 > 0:
        j1 = H0 + tl.arange(0, H1)
        z1 = tl.zeros((BM, H1), tl.float32)
        w1 = w_ptr + j1[None, :] * w_stride + k[:, None]
        if up_ptr is not None:
            u1 = tl.zeros((BM, H1), tl.float32)
            up1 = up_ptr + j1[None, :] * up_stride + k[:, None]

    for start in range(0, d, BK):
        inside = k < d - start
        tile = load(x, None, inside[None, :], True, EVEN_D)
        z0 = _add(z0, tile, w0, inside, j0, h, PRECISION, EVEN_D, EVEN_H)
        w0 += BK
        if up_ptr is not None:
            u0 = _add(u0, tile, up0, inside, j0, h, PRECISION, EVEN_D, EVEN_H)
            up0 += BK
        if H1 > 0:
            z1 = _add(z1, tile, w1, inside, j1, h, PRECISION, EVEN_D, EVEN_H)
            w1 += BK
            if up_ptr is not None:
                u1 = _add(u1, tile, up1, inside, j1, h, PRECISION, EVEN_D, EVEN_H)
                up1 += BK
        x += BK

    a0 = _hidden(z0, u0, bias_ptr, up_bias_ptr, j0, h, y_ptr, ACTIVATION, GATE)
    if H1 > 0:
        a1 = _hidden(z1, u1, bias_ptr, up_bias_ptr, j1, h, y_ptr, ACTIVATION, GATE)

    rows = m.to(tl.int64)[:, None] * O
    for start in range(0, O, BN):
        o = start + tl.arange(0, BN)
        y = tl.zeros((BM, BN), tl.float32)
        column = out_w_ptr + o.to(tl.int64)[None, :] * out_w_stride
        part = load(column + j0[:, None], (j0 < h)[:, None], (o < O)[None, :], EVEN_H, EVEN_O)
        y = tl.dot(a0, part, y, input_precision=PRECISION)
        if H1 > 0:
            part = load(column + j1[:, None], (j1 < h)[:, None], (o < O)[None, :], EVEN_H, EVEN_O)
            y = tl.dot(a1, part, y, input_precision=PRECISION)
        if out_bias_ptr is not None:
            y += tl.load(out_bias_ptr + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
        mask = (m < T)[:, None] if EVEN_O else (m < T)[:, None] & (o < O)[None, :]
        tl.store(y_ptr + rows + o[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
