"""All experts at once with torch's grouped products, without waiting for the device: for CUDA graphs and many experts.

Rows beyond the last end are left unwritten by these products. They are never read by another row's result: products
that sum over rows stop at the ends, and what is returned has zeros there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fusion_kernels.activations import get_activation
from fusion_kernels.experts.operators import folded, owned, rows_of_experts, sum_of_rows
from fusion_kernels.mlp.operators import Gradients, Outputs, Saved, packed, saved
from fusion_kernels.mlp.reference import Block
from fusion_kernels.mlp.torch_backend import act_backward


def forward(x: Tensor, ends: Tensor, block: Block, checkpoint_level: int) -> Outputs:
    """See `fusion_kernels.experts.operators`.

    Raises:
        ValueError: float64, or sizes that are no multiples of 16 bytes.
    """
    w_in, b_in, w_gate, b_gate, w_out, b_out, scale, activation = block
    sizes = (*w_in.shape[1:], w_out.shape[1])
    if x.dtype == torch.float64 or any(size * x.element_size() % 16 for size in sizes):
        raise ValueError(
            f"grouped_mm takes float32, bfloat16 and float16 in sizes of whole 16 bytes, not {x.dtype} and {sizes}: "
            "use backend='loop'"
        )
    ends = ends.int()
    owner = rows_of_experts(ends, len(x))
    phi = get_activation(activation).function
    z = _project(x, w_in, b_in, ends, owner)
    g = None if w_gate is None else _project(x, w_gate, b_gate, ends, owner)
    a = phi(z) if g is None else phi(g) * z
    y = _project(a, folded(w_out, scale, x), b_out, ends, owner)
    return owned(saved(y, z, g, a, checkpoint_level), owner, len(w_in))


def backward(
    dy: Tensor, x: Tensor, ends: Tensor, block: Block, kept: Saved, checkpoint_level: int, needs: Sequence[bool]
) -> Gradients:
    """See `fusion_kernels.experts.operators`."""
    w_in, b_in, w_gate, b_gate, w_out, b_out, scale, activation = block
    z, g, a = kept
    ends, dy = ends.int(), dy.contiguous()
    owner = rows_of_experts(ends, len(x))
    if checkpoint_level == 2:
        z = _project(x, w_in, b_in, ends, owner)
        g = g if w_gate is None else _project(x, w_gate, b_gate, ends, owner)
    phi = get_activation(activation).function
    if checkpoint_level != 0:
        a = phi(z) if w_gate is None else phi(g) * z
    da = F.grouped_mm(dy, folded(w_out, scale, x), offs=ends)
    dg = None
    if w_gate is None:
        dz = act_backward(da, z, activation)
    else:
        dz, dg = da * phi(g), act_backward(da * z, g, activation)
    dx = dw_gate = db_in = db_gate = db_out = dw_out = dp = None
    if needs[0]:
        dx = F.grouped_mm(dz, w_in.to(x.dtype), offs=ends)
        if dg is not None and w_gate is not None:
            dx += F.grouped_mm(dg, w_gate.to(x.dtype), offs=ends)
        owned((dx,), owner, len(w_in))
    dw_in = _weight_gradient(dz, x, ends, w_in) if needs[1] else None
    if needs[2] and b_in is not None:
        db_in = sum_of_rows(dz, ends).to(b_in.dtype)
    if needs[3] and dg is not None and w_gate is not None:
        dw_gate = _weight_gradient(dg, x, ends, w_gate)
    if needs[4] and dg is not None and b_gate is not None:
        db_gate = sum_of_rows(dg, ends).to(b_gate.dtype)
    if needs[5] or needs[7]:
        k = F.grouped_mm(dy.mT, a, offs=ends)  # (E, d_out, h)
        wide = torch.promote_types(torch.promote_types(w_out.dtype, k.dtype), torch.float32)
        if needs[5]:
            dw_out = (k if scale is None else k.to(wide) * scale.to(wide).unsqueeze(1)).to(w_out.dtype)
        if needs[7] and scale is not None:
            dp = (k.to(wide) * w_out.to(wide)).sum(1).to(scale.dtype)
    if needs[6] and b_out is not None:
        db_out = sum_of_rows(dy, ends).to(b_out.dtype)
    return packed(x, (dx, dw_in, db_in, dw_gate, db_gate, dw_out, db_out, dp))


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor, owner: Tensor) -> Tensor:
    """x (S, n) by the weight (E, m, n) and bias (E, m) of every row's expert."""
    y = F.grouped_mm(x, weight.to(x.dtype).mT, offs=ends)
    if bias is not None:
        y += bias.to(x.dtype)[owner.clamp(max=len(bias) - 1)]
    return y


def _weight_gradient(d: Tensor, x: Tensor, ends: Tensor, weight: Tensor) -> Tensor:
    return F.grouped_mm(d.mT, x, offs=ends).to(weight.dtype)
