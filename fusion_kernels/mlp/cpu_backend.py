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
from fusion_kernels.mlp.operators import Gradients, Outputs, Saved
from fusion_kernels.mlp.reference import Block


def forward(x: Tensor, block: Block, checkpoint_level: int) -> Outputs:
    """See `fusion_kernels.mlp.operators`."""
    outputs: Outputs = native.operators().mlp.default(x, *_tensors(block, x), block.activation, checkpoint_level)
    return outputs


def output(x: Tensor, block: Block) -> Tensor:
    """y of the forward, which keeps nothing."""
    y: Tensor = native.operators().mlp_output.default(x, *_tensors(block, x), block.activation)
    return y


def backward(
    dy: Tensor, x: Tensor, block: Block, kept: Saved, checkpoint_level: int, needs: Sequence[bool]
) -> Gradients:
    """See `fusion_kernels.mlp.operators`."""
    w_in, b_in, w_gate, b_gate, w_out, _, scale, activation = block
    found = native.operators().mlp_backward.default(
        dy if dy.stride(1) == 1 else dy.contiguous(), x,
        _cast(w_in, x), _cast(b_in, x), _cast(w_gate, x), _cast(b_gate, x), _cast(w_out, x), _factors(scale, x),
        *kept, activation, sum(1 << bit for bit, need in enumerate(needs) if need),
    )  # fmt: skip
    dx, dw_in, db_in, dw_gate, db_gate, dw_out, db_out, dscale = (
        t.to(like.dtype) if need and like is not None else None
        for t, like, need in zip(found, (x, *block.tensors), needs, strict=True)
    )
    return dx, dw_in, db_in, dw_gate, db_gate, dw_out, db_out, dscale


def _tensors(block: Block, x: Tensor) -> tuple[Tensor | None, ...]:
    """The block's tensors as the compiled operators take them."""
    w_in, b_in, w_gate, b_gate, w_out, b_out, scale, _ = block
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
