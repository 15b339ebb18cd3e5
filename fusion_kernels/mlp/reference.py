"""A feed-forward block of few neurons and its gradients: the specification of `fusion_kernels::mlp`.

With p the scale behind phi and q the one before it (1 where there is none), z = x W_inᵀ + b_in and, in a gated block,
g = x W_gateᵀ + b_gate,

    a = phi(q z)   or   a = phi(q g) z            y = (a p) W_out + b_out

or, where the gate has limits or an offset (`fusion_kernels.gates`), a = s(q g) up(q z), with s the limited phi,

p may be folded into W_out, then costs nothing per token, and its gradient comes from the product that gives the one of
W_out; q may be folded into W_in or W_gate:

    dA = dY W_outᵀ diag(p)         K = aᵀ dY          dW_out = diag(p) K          dp = sum_o W_out o K
    plain   dZ = q dA phi'(q z)    gated   dZ = dA phi(q g)      dG = q dA z phi'(q g)
            dq = sum_t z dA phi'(q z)              dq = sum_t g dA z phi'(q g)
    limits  dZ = q dA s(q g) up'(q z)              dG = q dA up(q z) s'(q g)
            dq = sum_t z dA s(q g) up'(q z) + g dA up(q z) s'(q g)
    dX = dZ W_in + dG W_gate       dW_in = dZᵀ X      db_in = sum_t dZ            (likewise W_gate, b_gate with dG)

All of it is made of differentiable torch operations: `mlp` is also what runs under `torch.func`, and derivatives of
`mlp_backward` are the second derivatives of the operator. The gradient of W_out lies in memory as that of the weight of
a `torch.nn.Linear` does, which is its transpose.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fusion_kernels.activations import get_activation
from fusion_kernels.ffn import FFN
from fusion_kernels.mlp.types import Gradients, Needs


def factors(scale: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(q, p) of a block's scale: (N,) is p alone, (2, N) is p above q."""
    if scale is None or scale.ndim == 1:
        return None, scale
    return scale[1], scale[0]


def times(t: Tensor, factor: Tensor | None) -> Tensor:
    """t * factor in the dtype of t, rounded once; the factor of any floating-point or integer dtype, or None for 1."""
    if factor is None:
        return t
    if not factor.is_floating_point():
        factor = factor.to(torch.promote_types(t.dtype, torch.float32))
    return (t * factor).to(t.dtype)


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b in the dtype of x, the weights cast to it."""
    dtype = x.dtype
    if weight.dtype == dtype and (bias is None or bias.dtype == dtype):
        return F.linear(x, weight, bias)  # the few microseconds of two casts to nothing else are a block of one token's
    return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))


def hidden(x: Tensor, ffn: FFN, before: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
    """(z, g, a), each (T, N), with the factor `before` phi in a alone; g is None for a plain block."""
    phi = get_activation(ffn.activation).function
    z = project(x, ffn.w_in, ffn.b_in)
    if ffn.w_gate is None:
        return z, None, phi(times(z, before))
    g, gate = project(x, ffn.w_gate, ffn.b_gate), ffn.gating
    return z, g, gate.after(phi(gate.inside(times(g, before)))) * gate.up(times(z, before_up(ffn, before)))


def before_up(ffn: FFN, before: Tensor | None) -> Tensor | None:
    """The factor `before` phi for the up projection too: where that is more than a factor."""
    return None if ffn.up_multiplies else before


def mlp(x: Tensor, ffn: FFN) -> Tensor:
    """Return y (..., d_out) of x (..., d), in the dtype of x."""
    before, behind = factors(ffn.scale)
    _, _, a = hidden(x, ffn, before)
    return project(times(a, behind), ffn.w_out.mT, ffn.b_out)


def mlp_backward(dy: Tensor, x: Tensor, ffn: FFN, needs: Needs) -> Gradients:
    """Return the gradients of `mlp` for dy (T, d_out) and x (T, d)."""
    phi = get_activation(ffn.activation)
    before, behind = factors(ffn.scale)
    z, g, a = hidden(x, ffn, before)
    da = times(dy @ ffn.w_out.mT.to(x.dtype), behind)
    dg: Tensor | None = None
    dup: Tensor | None = None
    if g is None:
        inside = z
        inner = da * phi.derivative(times(z, before))
        dz = times(inner, before)
    else:
        inside, argument, up_factor, gate = g, times(g, before), before_up(ffn, before), ffn.gating
        up, value = times(z, up_factor), phi.function(gate.inside(argument))
        dup = gate.through_up(da * gate.after(value), up)
        dz = times(dup, up_factor)
        slope = phi.derivative(gate.inside(argument))
        inner = gate.through_gate(da * gate.up(up) * slope, argument, value)
        dg = times(inner, before)
    dx = dz @ ffn.w_in.to(x.dtype)
    if dg is not None and ffn.w_gate is not None:
        dx = dx + dg @ ffn.w_gate.to(x.dtype)
    k = (dy.mT @ a).mT
    wide = torch.promote_types(torch.promote_types(ffn.w_out.dtype, x.dtype), torch.float32)
    dscale: Tensor | None = None
    if needs.scale and ffn.scale is not None:
        dscale = (k.to(wide) * ffn.w_out.to(wide)).sum(1)
        if before is not None:
            d_before = (inner.to(wide) * inside.to(wide)).sum(0)
            if dup is not None and not ffn.up_multiplies:
                d_before = d_before + (dup.to(wide) * z.to(wide)).sum(0)
            dscale = torch.stack([dscale, d_before])
    found = Gradients(
        x=dx,
        w_in=dz.mT @ x,
        w_out=k if behind is None else k.to(wide) * behind.to(wide).unsqueeze(1),
        w_gate=None if dg is None else dg.mT @ x,
        b_in=dz.sum(0),
        b_gate=None if dg is None else dg.sum(0),
        b_out=dy.sum(0),
        scale=dscale,
    )
    return found.asked(x, ffn, needs)
