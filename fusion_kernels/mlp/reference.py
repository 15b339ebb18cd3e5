"""A feed-forward block of few neurons and its gradients: the specification of `fusion_kernels::mlp`.

With p the scale behind phi and q the one before it (1 where there is none), z = x W_inᵀ + b_in and, in a gated block,
g = x W_gateᵀ + b_gate,

    a = phi(q z)   or   a = phi(q g) z            y = (a p) W_outᵀ + b_out

p may be folded into W_out, then costs nothing per token, and its gradient comes from the product that gives the one of
W_out; q may be folded into W_in or W_gate:

    dA = dY W_out diag(p)          K = dYᵀ a          dW_out = K diag(p)          dp = sum_o W_out o K
    plain   dZ = q dA phi'(q z)    gated   dZ = dA phi(q g)      dG = q dA z phi'(q g)
            dq = sum_t z dA phi'(q z)              dq = sum_t g dA z phi'(q g)
    dX = dZ W_in + dG W_gate       dW_in = dZᵀ X      db_in = sum_t dZ            (likewise W_gate, b_gate with dG)

All of it is made of differentiable torch operations: `mlp` is also what runs under `torch.func`, and derivatives of
`mlp_backward` are the second derivatives of the operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fusion_kernels.activations import get_activation

#: dX, dW_in, db_in, dW_gate, db_gate, dW_out, db_out, dp; None for what was not asked for.
Gradients = tuple[
    Tensor | None, Tensor | None, Tensor | None, Tensor | None,
    Tensor | None, Tensor | None, Tensor | None, Tensor | None,
]  # fmt: skip


class Block(NamedTuple):
    """A block as its operators take it behind x, in the order of their schemas; those of experts with an axis before.

    Attributes:
        w_in: (h, d); the up projection of a gated block.
        b_in: (h,).
        w_gate: (h, d); the block is gated when it is there.
        b_gate: (h,).
        w_out: (d_out, h).
        b_out: (d_out,).
        scale: (h,) or (2, h), of a floating-point or integer dtype.
        activation: name of phi in `fusion_kernels.activations`.
    """

    w_in: Tensor
    b_in: Tensor | None
    w_gate: Tensor | None
    b_gate: Tensor | None
    w_out: Tensor
    b_out: Tensor | None
    scale: Tensor | None
    activation: str

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All but the activation: with x before them, what gradients belong to."""
        return self[:-1]

    def expert(self, expert: int) -> Block:
        """The block of one of the experts."""
        return Block._make((*(None if t is None else t[expert] for t in self.tensors), self.activation))


def fold_scale(w_out: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """W_out diag(p) in `dtype`, rounded once; W_out itself where there is neither a scale nor a cast."""
    if scale is None:
        return w_out.to(dtype)
    wide = torch.promote_types(torch.promote_types(w_out.dtype, dtype), torch.float32)
    return (w_out.to(wide) * scale.to(wide)).to(dtype)


def factors(scale: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(q, p) of the operator's scale: (h,) is p alone, (2, h) is p above q."""
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


def hidden(x: Tensor, block: Block, before: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
    """(z, g, a), each (T, h), with the factor `before` phi in a alone; g is None for a plain block."""
    phi = get_activation(block.activation).function
    z = project(x, block.w_in, block.b_in)
    if block.w_gate is None:
        return z, None, phi(times(z, before))
    g = project(x, block.w_gate, block.b_gate)
    return z, g, phi(times(g, before)) * z


def mlp(x: Tensor, block: Block) -> Tensor:
    """Return y (..., d_out) of x (..., d), in the dtype of x."""
    before, behind = factors(block.scale)
    _, _, a = hidden(x, block, before)
    return project(times(a, behind), block.w_out, block.b_out)


def mlp_backward(dy: Tensor, x: Tensor, block: Block, needs: Sequence[bool]) -> Gradients:
    """Return the gradients of `mlp` for dy (T, d_out) and x (T, d), each in the dtype of what it belongs to.

    Args:
        needs: whether x and each of `block.tensors` need theirs.
    """
    w_in, b_in, w_gate, b_gate, w_out, b_out, scale, activation = block
    phi = get_activation(activation)
    before, behind = factors(scale)
    z, g, a = hidden(x, block, before)
    da = times(dy @ w_out.to(x.dtype), behind)
    dg: Tensor | None = None
    if g is None:
        inside = z
        inner = da * phi.derivative(times(z, before))
        dz = times(inner, before)
    else:
        inside, argument = g, times(g, before)
        dz = da * phi.function(argument)
        inner = da * z * phi.derivative(argument)
        dg = times(inner, before)
    dx = dz @ w_in.to(x.dtype)
    if dg is not None and w_gate is not None:
        dx = dx + dg @ w_gate.to(x.dtype)
    k = dy.mT @ a
    wide = torch.promote_types(torch.promote_types(w_out.dtype, x.dtype), torch.float32)
    k_wide = k.to(wide)
    dscale: Tensor | None = None
    if needs[7] and scale is not None:
        dscale = (k_wide * w_out.to(wide)).sum(0)
        if before is not None:
            dscale = torch.stack([dscale, (inner.to(wide) * inside.to(wide)).sum(0)])
        dscale = dscale.to(scale.dtype)
    return (
        dx if needs[0] else None,
        (dz.mT @ x).to(w_in.dtype) if needs[1] else None,
        dz.sum(0).to(b_in.dtype) if needs[2] and b_in is not None else None,
        (dg.mT @ x).to(w_gate.dtype) if needs[3] and dg is not None and w_gate is not None else None,
        dg.sum(0).to(b_gate.dtype) if needs[4] and dg is not None and b_gate is not None else None,
        (k if behind is None else k_wide * behind.to(wide)).to(w_out.dtype) if needs[5] else None,
        dy.sum(0).to(b_out.dtype) if needs[6] and b_out is not None else None,
        dscale,
    )
