"""All experts at once with torch's grouped products, without waiting for the device: for CUDA graphs and many experts.

The rows of all experts are gathered for these products, and once more for those of the backward. Rows beyond the last
end are left unwritten by them. They are never read by another row's result: products that sum over rows stop at the
ends, and what is returned has zeros there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fusion_kernels.activations import get_activation
from fusion_kernels.experts.operators import by_choice, owned, rows_of_experts, sum_of_rows, tokens_of
from fusion_kernels.experts.reference import sum_of_choices
from fusion_kernels.ffn import FFN
from fusion_kernels.mlp.folding import fold_scale
from fusion_kernels.mlp.operators import saved
from fusion_kernels.mlp.torch_backend import act_backward, gated_backward, output_gradients
from fusion_kernels.mlp.types import Gradients, Needs, Outputs, Saved


def forward(x: Tensor, order: Tensor, ends: Tensor, ffn: FFN, checkpoint_level: int) -> Outputs:
    """See `fusion_kernels.mlp.operators`.

    Raises:
        ValueError: float64, or sizes that are no multiples of 16 bytes.
    """
    sizes = (*ffn.w_in.shape[1:], ffn.w_out.shape[2])
    if x.dtype == torch.float64 or any(size * x.element_size() % 16 for size in sizes):
        raise ValueError(
            f"grouped_mm takes float32, bfloat16 and float16 in sizes of whole 16 bytes, not {x.dtype} and {sizes}: "
            "use backend='loop'"
        )
    x, ends = x.index_select(0, tokens_of(order, x)), ends.int()
    owner = rows_of_experts(ends, len(x))
    phi, gate = get_activation(ffn.activation).function, ffn.gating
    z, g = _hidden(x, ffn, ends, owner)
    a = phi(z) if g is None else gate.after(phi(gate.inside(g))) * gate.up(z)
    y = _project(a, fold_scale(ffn.w_out, ffn.scale, x.dtype).mT, ffn.b_out, ends, owner)
    y, *kept = owned(saved(y, z, g, a, checkpoint_level), owner, len(ffn.w_in))
    return by_choice(y, order), kept[0], kept[1], kept[2]


def backward(
    dy: Tensor, x: Tensor, order: Tensor, ends: Tensor, ffn: FFN, kept: Saved, checkpoint_level: int, needs: Needs
) -> Gradients:
    """See `fusion_kernels.mlp.operators`."""
    z, g, a = kept
    ends, dy, rows = ends.int(), dy.index_select(0, order), x.index_select(0, tokens_of(order, x))
    owner = rows_of_experts(ends, len(rows))
    if checkpoint_level == 2:
        z, again = _hidden(rows, ffn, ends, owner)
        g = g if again is None else again
    phi, gate = get_activation(ffn.activation).function, ffn.gating
    da = F.grouped_mm(dy, fold_scale(ffn.w_out, ffn.scale, x.dtype).mT, offs=ends)
    dg = None
    if ffn.gated:
        value = phi(gate.inside(g))
        dg, dz = gated_backward(da, g, z, value, ffn)
        a = a if checkpoint_level == 0 else gate.after(value) * gate.up(z)
    else:
        dz = act_backward(da, z, ffn.activation)
        a = a if checkpoint_level == 0 else phi(z)
    dx = dw_in = dw_gate = dw_out = dp = None
    if needs.x:
        dx = F.grouped_mm(dz, ffn.w_in.to(x.dtype), offs=ends)
        if dg is not None and ffn.w_gate is not None:
            dx += F.grouped_mm(dg, ffn.w_gate.to(x.dtype), offs=ends)
        (dx,) = owned((dx,), owner, len(ffn.w_in))
        dx = sum_of_choices(by_choice(dx, order), x)
    if needs.w_in:
        dw_in = F.grouped_mm(dz.mT, rows, offs=ends)
    if needs.w_gate and dg is not None:
        dw_gate = F.grouped_mm(dg.mT, rows, offs=ends)
    if needs.w_out or needs.scale:
        dw_out, dp = output_gradients(F.grouped_mm(dy.mT, a, offs=ends).mT, ffn, needs)
    db_in = sum_of_rows(dz, ends) if needs.b_in else None
    db_gate = sum_of_rows(dg, ends) if needs.b_gate and dg is not None else None
    db_out = sum_of_rows(dy, ends) if needs.b_out else None
    return Gradients(dx, dw_in, dw_out, dw_gate, db_in, db_gate, db_out, dp).asked(x, ffn, needs)


def _hidden(x: Tensor, ffn: FFN, ends: Tensor, owner: Tensor) -> tuple[Tensor, Tensor | None]:
    """(z, g), each (S, N); g is None for plain blocks."""
    g = None if ffn.w_gate is None else _project(x, ffn.w_gate, ffn.b_gate, ends, owner)
    return _project(x, ffn.w_in, ffn.b_in, ends, owner), g


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor, owner: Tensor) -> Tensor:
    """x (S, n) by the weight (E, m, n) and bias (E, m) of every row's expert."""
    y = F.grouped_mm(x, weight.to(x.dtype).mT, offs=ends)
    if bias is not None:
        y += bias.to(x.dtype)[owner.clamp(max=len(bias) - 1)]
    return y
