"""The block composed of torch's own operations, on any device, with what the levels save.

Products go through torch's BLAS; activations and their derivatives are torch's fused pointwise kernels where it has
them. The forward is the specification's; the paths that replace single steps of the backward share `gradients`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fusion_kernels.activations import get_activation
from fusion_kernels.ffn import FFN
from fusion_kernels.mlp import reference as reference
from fusion_kernels.mlp.folding import fold_scale
from fusion_kernels.mlp.types import Gradients, Needs, Saved

_aten = torch.ops.aten


def backward(dy: Tensor, x: Tensor, ffn: FFN, kept: Saved, checkpoint_level: int, needs: Needs) -> Gradients:
    """See `fusion_kernels.mlp.operators`."""
    z, g, a = kept
    gated = ffn.w_gate is not None
    if checkpoint_level == 2:
        z = reference.project(x, ffn.w_in, ffn.b_in)
        g = g if ffn.w_gate is None else reference.project(x, ffn.w_gate, ffn.b_gate)
    before, behind = reference.factors(ffn.scale)
    argument, phi = reference.times(g if gated else z, before), get_activation(ffn.activation).function
    da = dz = dg = inner = dup = None
    if needs_inside(needs) or (needs.scale and before is not None):
        da = dy @ fold_scale(ffn.w_out, behind, x.dtype).mT
    if gated:
        factor = reference.before_up(ffn, before)
        up, value = reference.times(z, factor), phi(ffn.gating.inside(argument))
        if da is not None:
            inner, dup = gated_backward(da, argument, up, value, ffn)
            dz, dg = reference.times(dup, factor), reference.times(inner, before)
        a = a if checkpoint_level == 0 else ffn.gating.after(value) * ffn.gating.up(up)
    else:
        if da is not None:
            inner = act_backward(da, argument, ffn.activation)
            dz = reference.times(inner, before)
        if checkpoint_level != 0 and (needs.w_out or needs.scale):
            a = phi(argument)
    one_factor = ffn if before is None else dataclasses.replace(ffn, scale=behind)
    found = gradients(dy, x, one_factor, dz, dg, a, needs)
    if found.scale is None or inner is None or before is None:
        return found
    wide = torch.promote_types(x.dtype, torch.float32)
    d_before = (inner.to(wide) * (g if gated else z).to(wide)).sum(0)
    if dup is not None and not ffn.up_multiplies:
        d_before = d_before + (dup.to(wide) * z.to(wide)).sum(0)
    return found._replace(scale=torch.stack([found.scale, d_before.to(found.scale.dtype)]))


def needs_inside(needs: Needs) -> bool:
    """Whether anything before the activation needs its gradient."""
    return needs.x or needs.w_in or needs.b_in or needs.w_gate or needs.b_gate


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


def gated_backward(da: Tensor, gate: Tensor, up: Tensor, value: Tensor, ffn: FFN) -> tuple[Tensor, Tensor]:
    """The gradients of a gated block's hidden values by `gate` and `up`, which the scale does not enter any more.

    Args:
        da: by the hidden values.
        value: phi of the gate inside its limits.
    """
    form = ffn.gating
    # Beyond the limits, where phi takes another argument, nothing goes through.
    inner = act_backward(da * form.up(up), gate, ffn.activation)
    return form.through_gate(inner, gate, value), form.through_up(da * form.after(value), up)


def gradients(
    dy: Tensor,
    x: Tensor,
    ffn: FFN,
    dz: Tensor | None,
    dg: Tensor | None,
    a: Tensor,
    needs: Needs,
    db_in: Tensor | None = None,
    db_gate: Tensor | None = None,
) -> Gradients:
    """The gradients that are asked for, from those of the pre-activations.

    Args:
        ffn: its scale (N,) or None.
        dz, dg: (T, N); None where no gradient needs them, dg also for a plain block.
        a: (T, N); unused unless W_out or p needs its gradient.
        db_in, db_gate: sums of dz and dg over tokens, where a kernel has made them on its way.
    """
    dx = dw_in = dw_gate = db_out = dw_out = dp = None
    if needs.x and dz is not None:
        dx = dz @ ffn.w_in.to(x.dtype)
        if dg is not None and ffn.w_gate is not None:
            dx.addmm_(dg, ffn.w_gate.to(x.dtype))
    if needs.w_in and dz is not None:
        dw_in = dz.t() @ x
    if needs.b_in and dz is not None and db_in is None and ffn.b_in is not None:
        db_in = dz.sum(0)
    if needs.w_gate and dg is not None:
        dw_gate = dg.t() @ x
    if needs.b_gate and dg is not None and db_gate is None and ffn.b_gate is not None:
        db_gate = dg.sum(0)
    if needs.w_out or needs.scale:
        dw_out, dp = output_gradients((dy.t() @ a).t(), ffn, needs)
    if needs.b_out and ffn.b_out is not None:
        db_out = dy.sum(0)
    return Gradients(dx, dw_in, dw_out, dw_gate, db_in, db_gate, db_out, dp).asked(x, ffn, needs)


def output_gradients(k: Tensor, ffn: FFN, needs: Needs) -> tuple[Tensor | None, Tensor | None]:
    """(dW_out, dp) from K = aᵀ dY (..., N, d_out), of one block or of experts."""
    if ffn.scale is None:
        return k.to(ffn.w_out.dtype) if needs.w_out else None, None
    wide = torch.promote_types(torch.promote_types(ffn.w_out.dtype, k.dtype), torch.float32)
    k = k.to(wide)
    dp = (k * ffn.w_out.to(wide)).sum(-1).to(ffn.scale.dtype) if needs.scale else None
    return (k * ffn.scale.to(wide).unsqueeze(-1)).to(ffn.w_out.dtype) if needs.w_out else None, dp
