"""The block composed of torch's own operations, on any device, with what the levels save.

Products go through torch's BLAS; activations and their derivatives are torch's fused pointwise kernels where it has
them. The forward is the specification's; the paths that replace single steps of the backward share `gradients`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusion_kernels.activations import get_activation
from fusion_kernels.mlp import reference as reference
from fusion_kernels.mlp.operators import Gradients, Saved
from fusion_kernels.mlp.reference import Block

_aten = torch.ops.aten


def backward(
    dy: Tensor, x: Tensor, block: Block, kept: Saved, checkpoint_level: int, needs: Sequence[bool]
) -> Gradients:
    """See `fusion_kernels.mlp.operators`."""
    w_in, b_in, w_gate, b_gate, w_out, _, scale, activation = block
    z, g, a = kept
    if checkpoint_level == 2:
        z = reference.project(x, w_in, b_in)
        g = g if w_gate is None else reference.project(x, w_gate, b_gate)
    before, behind = reference.factors(scale)
    inside = z if w_gate is None else g
    argument, phi = reference.times(inside, before), get_activation(activation).function
    dz = dg = inner = None
    if any(needs[:5]) or (needs[7] and before is not None):
        da = dy @ reference.fold_scale(w_out, behind, x.dtype)
        inner = act_backward(da if w_gate is None else da * z, argument, activation)
    if w_gate is not None:
        value = phi(argument)
        if inner is not None:
            dz, dg = da * value, reference.times(inner, before)
        a = a if checkpoint_level == 0 else value * z
    else:
        dz = None if inner is None else reference.times(inner, before)
        if checkpoint_level != 0 and (needs[5] or needs[7]):
            a = phi(argument)
    one_factor = block if before is None else block._replace(scale=behind)
    *others, dp = gradients(dy, x, one_factor, dz, dg, a, needs)
    if dp is not None and inner is not None and before is not None and scale is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        d_before = (inner.to(wide) * inside.to(wide)).sum(0)
        dp = torch.stack([dp, d_before.to(dp.dtype)])
    return *others, dp  # type: ignore[return-value]


def act_backward(da: Tensor, z: Tensor, activation: str) -> Tensor:
    """da * activation'(z), by torch's own kernels, whose rounding is that of torch's autograd."""
    if activation == "gelu":
        return _aten.gelu_backward(da, z)
    if activation == "gelu_tanh":
        return _aten.gelu_backward(da, z, approximate="tanh")
    if activation == "silu":
        return _aten.silu_backward(da, z)
    if activation == "relu":
        return _aten.threshold_backward(da, z, 0)
    return da * get_activation(activation).derivative(z)


def gradients(
    dy: Tensor,
    x: Tensor,
    block: Block,
    dz: Tensor | None,
    dg: Tensor | None,
    a: Tensor,
    needs: Sequence[bool],
    db_in: Tensor | None = None,
    db_gate: Tensor | None = None,
) -> Gradients:
    """The gradients that are asked for, from those of the pre-activations.

    Args:
        block: its scale (h,) or None.
        dz, dg: (T, h); None where no gradient needs them, dg also for a plain block.
        a: (T, h); unused unless W_out or p needs its gradient.
        db_in, db_gate: sums of dz and dg over tokens, where a kernel has made them on its way.
    """
    w_in, b_in, w_gate, b_gate, w_out, b_out, scale, _ = block
    dx = dw_in = dw_gate = db_out = dw_out = dp = None
    if needs[0] and dz is not None:
        dx = dz @ w_in.to(x.dtype)
        if dg is not None and w_gate is not None:
            dx.addmm_(dg, w_gate.to(x.dtype))
    if needs[1] and dz is not None:
        dw_in = (dz.t() @ x).to(w_in.dtype)
    if needs[2] and dz is not None and b_in is not None:
        db_in = (dz.sum(0) if db_in is None else db_in).to(b_in.dtype)
    if needs[3] and dg is not None and w_gate is not None:
        dw_gate = (dg.t() @ x).to(w_gate.dtype)
    if needs[4] and dg is not None and b_gate is not None:
        db_gate = (dg.sum(0) if db_gate is None else db_gate).to(b_gate.dtype)
    if needs[5] or needs[7]:
        dw_out, dp = output_gradients(dy.t() @ a, w_out, scale, needs)
    if needs[6] and b_out is not None:
        db_out = dy.sum(0).to(b_out.dtype)
    return dx, dw_in, db_in if needs[2] else None, dw_gate, db_gate if needs[4] else None, dw_out, db_out, dp


def output_gradients(
    k: Tensor, w_out: Tensor, scale: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """(dW_out, dp) from K = dYᵀ a (d_out, h)."""
    if scale is None:
        return k.to(w_out.dtype) if needs[5] else None, None
    wide = torch.promote_types(torch.promote_types(w_out.dtype, k.dtype), torch.float32)
    dp = (k.to(wide) * w_out.to(wide)).sum(0).to(scale.dtype) if needs[7] else None
    return (k.to(wide) * scale.to(wide)).to(w_out.dtype) if needs[5] else None, dp
