"""All experts at once with the Triton kernels of the MLP: activations inside the products, no wait for the device.

Triton is imported when a function is first called. Rows that belong to no expert are left unwritten by the kernels and
read by none; what is returned has zeros there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusion_kernels.experts.operators import folded, owned, rows_of_experts
from fusion_kernels.mlp.operators import Gradients, Outputs, Saved, packed, saved
from fusion_kernels.mlp.reference import Block


def forward(x: Tensor, ends: Tensor, block: Block, checkpoint_level: int) -> Outputs:
    """See `fusion_kernels.experts.operators`."""
    from fusion_kernels.mlp import triton_linear as kernels

    x, offsets = _rows(x), _offsets(ends)
    z, g, a = _hidden(x, offsets, block, checkpoint_level < 2)
    y = kernels.grouped_linear(a, folded(block.w_out, block.scale, x).mT, offsets, _cast(block.b_out, x))
    found = saved(y, a if z is None else z, g, a, checkpoint_level)
    return owned(found, rows_of_experts(ends, len(x)), len(block.w_in))


def backward(
    dy: Tensor, x: Tensor, ends: Tensor, block: Block, kept: Saved, checkpoint_level: int, needs: Sequence[bool]
) -> Gradients:
    """See `fusion_kernels.experts.operators`."""
    from fusion_kernels.mlp import triton_linear as kernels
    from fusion_kernels.mlp.triton_pointwise import column_sums

    w_in, b_in, w_gate, b_gate, w_out, b_out, scale, activation = block
    z, g, a = kept
    dy, x, offsets = _rows(dy), _rows(x), _offsets(ends)
    if checkpoint_level == 2:
        again = _hidden(x, offsets, block, True)
        assert again[0] is not None
        z, g = again[0], g if again[1] is None else again[1]
    need_a = checkpoint_level != 0 and (needs[5] or needs[7])
    w, sums = folded(w_out, scale, x), needs[2] or needs[4]
    dg = db_gate = None
    if w_gate is None:
        dz, remade, db_in = kernels.linear_act_backward(
            dy, w, z, activation, need_a=need_a, need_db1=sums, offsets=offsets
        )
    else:
        dg, dz, remade, db_gate, db_in = kernels.linear_glu_backward(
            dy, w, g, z, activation, need_a=need_a, need_db=sums, offsets=offsets
        )
    dx = dw_in = dw_gate = dw_out = dp = db_out = None
    if needs[0]:
        w, second = w_in.to(x.dtype), None
        if dg is not None and w_gate is not None:
            w_other = w_gate.to(x.dtype)
            if w.stride() != w_other.stride():
                w, w_other = w.contiguous(), w_other.contiguous()
            second = dg, w_other
        dx = kernels.grouped_linear(dz, w, offsets, second=second)
        owned((dx,), rows_of_experts(ends, len(x)), len(w_in))
    if needs[1]:
        dw_in = kernels.grouped_weight_gradient(dz, x, offsets, dtype=w_in.dtype)
    if needs[3] and dg is not None and w_gate is not None:
        dw_gate = kernels.grouped_weight_gradient(dg, x, offsets, dtype=w_gate.dtype)
    if needs[5] or needs[7]:
        wide = torch.promote_types(torch.promote_types(w_out.dtype, x.dtype), torch.float32)
        k = kernels.grouped_weight_gradient(dy, a if remade is None else remade, offsets, dtype=wide)
        dw_out = (k if scale is None else k * scale.to(wide).unsqueeze(1)).to(w_out.dtype) if needs[5] else None
        dp = (k * w_out.to(wide)).sum(1).to(scale.dtype) if needs[7] and scale is not None else None
    if needs[6] and b_out is not None:
        db_out = column_sums(dy, offsets).to(b_out.dtype)
    db_in = None if db_in is None or b_in is None or not needs[2] else db_in.to(b_in.dtype)
    db_gate = None if db_gate is None or b_gate is None or not needs[4] else db_gate.to(b_gate.dtype)
    return packed(x, (dx, dw_in, db_in, dw_gate, db_gate, dw_out, db_out, dp))


def _hidden(x: Tensor, offsets: Tensor, block: Block, keep: bool) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(z, g, a); z and g are None unless `keep`."""
    from fusion_kernels.mlp import triton_linear as kernels

    w, b, activation = block.w_in.to(x.dtype), _cast(block.b_in, x), block.activation
    if block.w_gate is None:
        z, a = kernels.linear_act(x, w, b, activation, save_z=keep, offsets=offsets)
        return z, None, a
    w_gate, b_gate = block.w_gate.to(x.dtype), _cast(block.b_gate, x)
    g, z, a = kernels.linear_glu(x, w_gate, w, b_gate, b, activation, save_z=keep, offsets=offsets)
    return z, g, a


def _offsets(ends: Tensor) -> Tensor:
    """(E + 1,) int32: where every expert's rows begin, and the end of the last."""
    return torch.nn.functional.pad(ends.int(), (1, 0))


def _cast(b: Tensor | None, x: Tensor) -> Tensor | None:
    return None if b is None else b.to(x.dtype)


def _rows(t: Tensor) -> Tensor:
    return t if t.shape[1] <= 1 or t.stride(1) == 1 else t.contiguous()
