"""All experts at once with the Triton kernels of the MLP: activations inside the products, no wait for the device.

Tokens and gradients of results are read where they lie, and results are written where they belong: none of them is
copied into the order of the experts. Triton is imported when a function is first called. Hidden rows that belong to no
expert are left unwritten by the kernels and read by none; what is returned has zeros there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusion_kernels.experts.operators import owned, rows_of_experts, tokens_of
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

    x, experts = _rows(x), _tiles(order, ends)
    z, g, a = _hidden(x, tokens_of(order, x), experts, ffn, checkpoint_level < 2)
    w, b = fold_scale(ffn.w_out, ffn.scale, x.dtype), _cast(ffn.b_out, x)
    y = kernels.grouped_linear(a, w, experts, b, places=order)
    found = saved(y, a if z is None else z, g, a, checkpoint_level)
    if checkpoint_level < 2:
        owned(found[1:], rows_of_experts(ends, len(order)), len(ffn.w_in))
    return found


def backward(
    dy: Tensor, x: Tensor, order: Tensor, ends: Tensor, ffn: FFN, kept: Saved, checkpoint_level: int, needs: Needs
) -> Gradients:
    """See `fusion_kernels.mlp.operators`."""
    from fusion_kernels.mlp import triton_linear as kernels
    from fusion_kernels.mlp.triton_pointwise import column_sums

    z, g, a = kept
    dy, x, experts, tokens = _rows(dy), _rows(x), _tiles(order, ends), tokens_of(order, x)
    if checkpoint_level == 2:
        again = _hidden(x, tokens, experts, ffn, True)
        assert again[0] is not None
        z, g = again[0], g if again[1] is None else again[1]
    need_a = checkpoint_level != 0 and (needs.w_out or needs.scale)
    w, sums = fold_scale(ffn.w_out, ffn.scale, x.dtype).mT, needs.b_in or needs.b_gate
    dg = db_gate = None
    if not ffn.gated:
        dz, remade, db_in = kernels.linear_act_backward(
            dy, w, z, ffn.activation, need_a=need_a, need_db1=sums, experts=experts, rows=order
        )
    else:
        dg, dz, remade, db_gate, db_in = kernels.linear_glu_backward(
            dy, w, g, z, ffn.activation, gating=ffn.gating, need_a=need_a, need_db=sums, experts=experts, rows=order
        )
    dx = dw_in = dw_gate = dw_out = dp = None
    if needs.x:
        dx = sum_of_choices(_input_gradient(dz, dg, order, experts, ffn), x)
    if needs.w_in:
        dw_in = kernels.grouped_weight_gradient(dz, x, experts.offsets, b_rows=tokens, dtype=ffn.w_in.dtype)
    if needs.w_gate and dg is not None and ffn.w_gate is not None:
        dw_gate = kernels.grouped_weight_gradient(dg, x, experts.offsets, b_rows=tokens, dtype=ffn.w_gate.dtype)
    if needs.w_out or needs.scale:
        wide = torch.promote_types(torch.promote_types(ffn.w_out.dtype, x.dtype), torch.float32)
        a = a if remade is None else remade
        k = kernels.grouped_weight_gradient(dy, a, experts.offsets, a_rows=order, dtype=wide)
        dw_out, dp = output_gradients(k.mT, ffn, needs)
    db_out = column_sums(dy, experts.offsets, rows=order) if needs.b_out else None
    return Gradients(dx, dw_in, dw_out, dw_gate, db_in, db_gate, db_out, dp).asked(x, ffn, needs)


def _input_gradient(dz: Tensor, dg: Tensor | None, order: Tensor, experts: ExpertTiles, ffn: FFN) -> Tensor:
    """dX of the pre-activations' gradients, in the order of the choices; zeros for those of no expert."""
    from fusion_kernels.mlp import triton_linear as kernels

    w, second = ffn.w_in.to(dz.dtype), None
    if dg is not None and ffn.w_gate is not None:
        w_other = ffn.w_gate.to(dz.dtype)
        if w.stride() != w_other.stride():
            w, w_other = w.contiguous(), w_other.contiguous()
        second = dg, w_other
    return kernels.grouped_linear(dz, w, experts, second=second, places=order)


def _hidden(
    x: Tensor, tokens: Tensor, experts: ExpertTiles, ffn: FFN, keep: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(z, g, a), sorted by expert; z and g are None unless `keep`."""
    from fusion_kernels.mlp import triton_linear as kernels

    w, b, activation = ffn.w_in.to(x.dtype), _cast(ffn.b_in, x), ffn.activation
    if ffn.w_gate is None:
        z, a = kernels.linear_act(x, w, b, activation, save_z=keep, experts=experts, rows=tokens)
        return z, None, a
    w_gate, b_gate = ffn.w_gate.to(x.dtype), _cast(ffn.b_gate, x)
    g, z, a = kernels.linear_glu(
        x, w_gate, w, b_gate, b, activation, gating=ffn.gating, save_z=keep, experts=experts, rows=tokens
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
