"""The block on the CPU: tokens in chunks whose hidden tile stays in the cache, with compiled activations.

Products go through torch's BLAS, but float32 ones of up to 20 tokens and weights with contiguous rows: those are dot
products, because a BLAS takes longer to begin than to multiply. What lies between them is one pass over the tile: the
activation, or its derivative together with the activation once more for W_out's gradient, computed in float32 (float64
for float64) whatever the dtype. The scale is a factor in that pass: weights are not copied. No hidden tensor exists
beyond what the level saves, and the gradients of the weights are summed over chunks where they end up, in float32 for
half precision. Results are the same bits run to run; with another number of threads a BLAS may split a product, and
then round, differently.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusion_kernels import native
from fusion_kernels.mlp.operators import Gradients, Outputs


def forward(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    scale: Tensor | None,
    activation: str,
    checkpoint_level: int,
    backend: str,
) -> Outputs:
    """See `fusion_kernels.mlp.operators`."""
    block = _block(x, w_in, b_in, w_gate, b_gate, w_out, b_out, scale)
    outputs: Outputs = native.operators().mlp.default(x, *block, activation, checkpoint_level)
    return outputs


def output(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    scale: Tensor | None,
    activation: str,
    checkpoint_level: int,
    backend: str,
) -> Tensor:
    """y of the forward, which keeps nothing."""
    block = _block(x, w_in, b_in, w_gate, b_gate, w_out, b_out, scale)
    y: Tensor = native.operators().mlp_output.default(x, *block, activation)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    scale: Tensor | None,
    z: Tensor,
    g: Tensor,
    a: Tensor,
    activation: str,
    checkpoint_level: int,
    backend: str,
    needs: Sequence[bool],
) -> Gradients:
    """See `fusion_kernels.mlp.operators`."""
    found = native.operators().mlp_backward.default(
        dy if dy.stride(1) == 1 else dy.contiguous(), x,
        _cast(w_in, x), _cast(b_in, x), _cast(w_gate, x), _cast(b_gate, x), _cast(w_out, x), _factors(scale, x),
        z, g, a, activation, sum(1 << bit for bit, need in enumerate(needs) if need),
    )  # fmt: skip
    inputs = (x, w_in, b_in, w_gate, b_gate, w_out, b_out, scale)
    dx, dw_in, db_in, dw_gate, db_gate, dw_out, db_out, dscale = (
        t.to(like.dtype) if need and like is not None else None
        for t, like, need in zip(found, inputs, needs, strict=True)
    )
    return dx, dw_in, db_in, dw_gate, db_gate, dw_out, db_out, dscale


def _block(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor | None, ...]:
    return (
        _cast(w_in, x), _cast(b_in, x), _cast(w_gate, x), _cast(b_gate, x), _cast(w_out, x), _cast(b_out, x),
        _factors(scale, x),
    )  # fmt: skip


def _factors(scale: Tensor | None, x: Tensor) -> Tensor | None:
    """The scale as the compiled operators take it: contiguous, in the dtype of their sums."""
    if scale is None:
        return None
    return scale.to(torch.float64 if x.dtype is torch.float64 else torch.float32).contiguous()


def _cast(t: Tensor | None, x: Tensor) -> Tensor | None:
    """`t` as the compiled operators take it: in the dtype of x, and contiguous if it is a vector."""
    if t is None or (t.dtype is x.dtype and (t.ndim == 2 or t.is_contiguous())):
        return t
    return t.to(x.dtype) if t.ndim == 2 else t.to(x.dtype).contiguous()
