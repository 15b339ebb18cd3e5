"""All experts at once with torch's grouped products, without waiting for the device: for CUDA graphs and many experts.

The rows of all experts are gathered for these products, and once more for those of the backward. Rows beyond the last
end are left unwritten by them. They are never read by another row's result: products that sum over rows stop at the
ends, and what is returned has zeros there.

`composed` is the same for a compiler, which differentiates it and fuses what stands around the products. It then
decides what is kept of hidden tensors, whatever the level.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fusion_kernels.activations import get_activation
from fusion_kernels.experts.operators import aligned, by_choice, owned, rows_of_experts, sum_of_rows, tokens_of
from fusion_kernels.experts.reference import choices, sum_of_choices
from fusion_kernels.ffn import FFN
from fusion_kernels.mlp.folding import fold_scale
from fusion_kernels.mlp.operators import saved
from fusion_kernels.mlp.torch_backend import act_backward, gated_backward, output_gradients
from fusion_kernels.mlp.types import Gradients, Needs, Outputs, Saved

#: (rows (S, n), weights (E, m, n), biases (E, m) or None) -> (S, m), each row by those of its expert.
Project = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def forward(x: Tensor, order: Tensor, ends: Tensor, ffn: FFN, checkpoint_level: int) -> Outputs:
    """See `fusion_kernels.mlp.operators`.

    Raises:
        ValueError: float64, or sizes that are no multiples of 16 bytes.
    """
    if x.dtype == torch.float64 or not aligned(x, ffn):
        sizes = (*ffn.w_in.shape[1:], ffn.w_out.shape[2])
        raise ValueError(
            f"grouped_mm takes float32, bfloat16 and float16 in sizes of whole 16 bytes, not {x.dtype} and {sizes}: "
            "use backend='loop'"
        )
    x, ends = x.index_select(0, tokens_of(order, x)), ends.int()
    owner = rows_of_experts(ends, len(x))
    y, z, g, a = _block(x, ffn, functools.partial(_project, ends=ends, owner=owner))
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
        z, again = _hidden(rows, ffn, functools.partial(_project, ends=ends, owner=owner))
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
        dx = F.grouped_mm(dz, _packed(ffn.w_in, x.dtype), offs=ends)
        if dg is not None and ffn.w_gate is not None:
            dx += F.grouped_mm(dg, _packed(ffn.w_gate, x.dtype), offs=ends)
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


def traceable(x: Tensor, ffn: FFN) -> bool:
    """Whether a compiler takes `composed`: it knows grouped products of bfloat16 only, and exports no checkpoints."""
    return x.dtype == torch.bfloat16 and aligned(x, ffn) and not _exporting()


# Compilers of torch 2.11 take it that they always do.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _exporting() -> bool:
    return torch.compiler.is_exporting()


def composed(x: Tensor, order: Tensor, ends: Tensor, ffn: FFN) -> Tensor:
    """y (S, d_out) in the order of the choices, by differentiable operations with the results of the operators.

    Zeros take the place of what products leave unwritten, forward and backward: it may be NaN, which no factor removes.
    """
    ends, owner = ends.int(), rows_of_experts(ends, len(order))
    nowhere = (owner >= len(ffn.w_in)).unsqueeze(1)
    places = by_choice(torch.arange(len(order), device=order.device), order)

    def project(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = _project(rows, weight, None, ends, owner)
        if bias is not None:
            y = _Biased.apply(y, bias, ends, owner)
        return y.masked_fill(nowhere, 0)

    def sorted_rows(x: Tensor) -> Tensor:
        # Each token k times: the gradient of that is a sum in the order of the choices.
        each = x.unsqueeze(1).expand(-1, choices(x, order), -1).flatten(0, 1)
        rows: Tensor = _Moved.apply(each, order, places)
        return rows.masked_fill(nowhere, 0)

    # Gathered again in the backward: a compiler would keep them, which are k times x.
    rows = checkpoint(sorted_rows, x, use_reentrant=False, preserve_rng_state=False)
    y, *_ = _block(rows, ffn, project)
    moved: Tensor = _Moved.apply(y, places, order)
    return moved


class _Moved(torch.autograd.Function):
    """rows[there] of a permutation `there`, whose inverse is `back`: autograd would add gradients up, in any order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return rows[there]

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        (back,) = ctx.saved_tensors
        return cotangents[0][back], None, None


class _Biased(torch.autograd.Function):
    """Rows (S, m) with the bias (E, m) of each one's expert, whose gradient is summed as the backward does."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, bias: Tensor, ends: Tensor, owner: Tensor) -> Tensor:
        ctx.save_for_backward(ends)
        ctx.dtype = bias.dtype
        return rows + _bias_of_rows(bias, rows, owner)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        (ends,), (given,) = ctx.saved_tensors, cotangents
        return given, sum_of_rows(given, ends).to(ctx.dtype), None, None


def _block(rows: Tensor, ffn: FFN, project: Project) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(y, z, g, a): y (S, d_out), the others (S, N)."""
    phi, gate = get_activation(ffn.activation).function, ffn.gating
    z, g = _hidden(rows, ffn, project)
    a = phi(z) if g is None else gate.after(phi(gate.inside(g))) * gate.up(z)
    return project(a, fold_scale(ffn.w_out, ffn.scale, rows.dtype).mT, ffn.b_out), z, g, a


def _hidden(rows: Tensor, ffn: FFN, project: Project) -> tuple[Tensor, Tensor | None]:
    """(z, g), each (S, N); g is None for plain blocks."""
    g = None if ffn.w_gate is None else project(rows, ffn.w_gate, ffn.b_gate)
    return project(rows, ffn.w_in, ffn.b_in), g


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor, owner: Tensor) -> Tensor:
    """x (S, n) by the weight (E, m, n) and bias (E, m) of every row's expert."""
    y = F.grouped_mm(x, _packed(weight, x.dtype).mT, offs=ends)
    if bias is not None:
        y += _bias_of_rows(bias, y, owner)
    return y


def _packed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights in `dtype`, rows or columns contiguous: views of gates that alternate with ups have neither."""
    weight = weight.to(dtype)
    # By views, since compilers stumble over strides; none of a first expert that is not there.
    packed = weight[:1, 0].is_contiguous() or weight[:1, :, 0].is_contiguous()
    return weight if packed else weight.contiguous()


def _bias_of_rows(bias: Tensor, rows: Tensor, owner: Tensor) -> Tensor:
    """(S, m): the bias of every row's expert, some bias for those of none."""
    return bias.to(rows.dtype)[owner.clamp(max=len(bias) - 1)]
