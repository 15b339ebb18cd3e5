"""All experts at once with the Triton kernels of the MLP: activations inside the products, no wait for the device.

Triton is imported when a function is first called. Rows that belong to no expert are left unwritten by the kernels and
read by none; what is returned has zeros there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusion_kernels.experts.operators import by_choice, owned, rows_of_experts, tokens_of
from fusion_kernels.experts.reference import sum_of_choices
from fusion_kernels.ffn import FFN
from fusion_kernels.mlp.folding import fold_scale
from fusion_kernels.mlp.operators import saved
from fusion_kernels.mlp.torch_backend import output_gradients
from fusion_kernels.mlp.types import Gradients, Needs, Outputs, Saved

if TYPE_CHECKING:
    from fusion_kernels.mlp.triton_tiles import ExpertTiles


def forward(x: Tensor, order: Tensor, ends: Tensor, ffn: FFN, checkpoint_level: int) -> Outputs:
    """See `fusion_kernels.mlp.operators`."""
    from fusion_kernels.mlp import triton_linear as kernels

    x, experts = _rows(x[tokens_of(order, x)]), _tiles(order, ends)
    z, g, a = _hidden(x, experts, ffn, checkpoint_level < 2)
    y = kernels.grouped_linear(a, fold_scale(ffn.w_out, ffn.scale, x.dtype), experts, _cast(ffn.b_out, x))
    found = saved(y, a if z is None else z, g, a, checkpoint_level)
    y, *kept = owned(found, rows_of_experts(ends, len(x)), len(ffn.w_in))
    return by_choice(y, order), kept[0], kept[1], kept[2]


def backward(
    dy: Tensor, x: Tensor, order: Tensor, ends: Tensor, ffn: FFN, kept: Saved, checkpoint_level: int, needs: Needs
) -> Gradients:
    """See `fusion_kernels.mlp.operators`."""
    from fusion_kernels.mlp import triton_linear as kernels
    from fusion_kernels.mlp.triton_pointwise import column_sums

    z, g, a = kept
    dy, rows, experts = dy[order], x[tokens_of(order, x)], _tiles(order, ends)
    if checkpoint_level == 2:
        again = _hidden(rows, experts, ffn, True)
        assert again[0] is not None
        z, g = again[0], g if again[1] is None else again[1]
    need_a = checkpoint_level != 0 and (needs.w_out or needs.scale)
    w, sums = fold_scale(ffn.w_out, ffn.scale, x.dtype).mT, needs.b_in or needs.b_gate
    dg = db_gate = None
    if not ffn.gated:
        dz, remade, db_in = kernels.linear_act_backward(
            dy, w, z, ffn.activation, need_a=need_a, need_db1=sums, experts=experts
        )
    else:
        dg, dz, remade, db_gate, db_in = kernels.linear_glu_backward(
            dy, w, g, z, ffn.activation, gating=ffn.gating, need_a=need_a, need_db=sums, experts=experts
        )
    dx = dw_in = dw_gate = dw_out = dp = None
    if needs.x:
        dx = _input_gradient(dz, dg, experts, ffn)
        (dx,) = owned((dx,), rows_of_experts(ends, len(rows)), len(ffn.w_in))
        dx = sum_of_choices(by_choice(dx, order), x)
    if needs.w_in:
        dw_in = kernels.grouped_weight_gradient(dz, rows, experts.offsets, dtype=ffn.w_in.dtype)
    if needs.w_gate and dg is not None and ffn.w_gate is not None:
        dw_gate = kernels.grouped_weight_gradient(dg, rows, experts.offsets, dtype=ffn.w_gate.dtype)
    if needs.w_out or needs.scale:
        wide = torch.promote_types(torch.promote_types(ffn.w_out.dtype, x.dtype), torch.float32)
        k = kernels.grouped_weight_gradient(dy, a if remade is None else remade, experts.offsets, dtype=wide)
        dw_out, dp = output_gradients(k.mT, ffn, needs)
    db_out = column_sums(dy, experts.offsets) if needs.b_out else None
    return Gradients(dx, dw_in, dw_out, dw_gate, db_in, db_gate, db_out, dp).asked(x, ffn, needs)


def _input_gradient(dz: Tensor, dg: Tensor | None, experts: ExpertTiles, ffn: FFN) -> Tensor:
    """dX of the pre-activations' gradients; rows of no expert are not written."""
    from fusion_kernels.mlp import triton_linear as kernels

    w, second = ffn.w_in.to(dz.dtype), None
    if dg is not None and ffn.w_gate is not None:
        w_other = ffn.w_gate.to(dz.dtype)
        if w.stride() != w_other.stride():
            w, w_other = w.contiguous(), w_other.contiguous()
        second = dg, w_other
    return kernels.grouped_linear(dz, w, experts, second=second)


def _hidden(x: Tensor, experts: ExpertTiles, ffn: FFN, keep: bool) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(z, g, a); z and g are None unless `keep`."""
    from fusion_kernels.mlp import triton_linear as kernels

    w, b, activation = ffn.w_in.to(x.dtype), _cast(ffn.b_in, x), ffn.activation
    if ffn.w_gate is None:
        z, a = kernels.linear_act(x, w, b, activation, save_z=keep, experts=experts)
        return z, None, a
    w_gate, b_gate = ffn.w_gate.to(x.dtype), _cast(ffn.b_gate, x)
    g, z, a = kernels.linear_glu(
        x, w_gate, w, b_gate, b, activation, gating=ffn.gating, save_z=keep, experts=experts
    )  # fmt: skip
    return z, g, a


def _tiles(order: Tensor, ends: Tensor) -> ExpertTiles:
    """Of one pass: what every product of it is told of whose rows are where."""
    from fusion_kernels.mlp.triton_tiles import ExpertTiles

    return ExpertTiles(torch.nn.functional.pad(ends.int(), (1, 0)), len(order))


def _cast(b: Tensor | None, x: Tensor) -> Tensor | None:
    return None if b is None else b.to(x.dtype)


def _rows(t: Tensor) -> Tensor:
    return t if t.shape[1] <= 1 or t.stride(1) == 1 else t.contiguous()
