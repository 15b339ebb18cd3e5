"""The scale of a block folded into its weights: for the products behind phi, and for backends with one factor only."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusion_kernels.ffn import FFN
from fusion_kernels.mlp.reference import factors
from fusion_kernels.mlp.types import Gradients, Needs, Outputs, Saved

Forward = Callable[[Tensor, FFN, int], Outputs]
Backward = Callable[[Tensor, Tensor, FFN, Saved, int, Needs], Gradients]


def fold_scale(w_out: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """diag(p) W_out in `dtype`, rounded once; W_out itself where there is neither a scale nor a cast.

    Args:
        w_out: (..., N, d_out).
        scale: p (..., N) or None.
    """
    if scale is None:
        return w_out.to(dtype)
    wide = torch.promote_types(torch.promote_types(w_out.dtype, dtype), torch.float32)
    return (w_out.to(wide) * scale.to(wide).unsqueeze(-1)).to(dtype)


def with_one_factor(forward: Forward, backward: Backward) -> tuple[Forward, Backward]:
    """A backend of blocks with a factor before phi, made of one whose scale is (N,) or None.

    The factor is folded into the projection that feeds phi.
    """

    @functools.wraps(forward)
    def forward_of_both(x: Tensor, ffn: FFN, checkpoint_level: int) -> Outputs:
        before, behind = factors(ffn.scale)
        return forward(x, ffn if before is None else _folded(x, ffn, before, behind), checkpoint_level)

    @functools.wraps(backward)
    def backward_of_both(
        dy: Tensor, x: Tensor, ffn: FFN, kept: Saved, checkpoint_level: int, needs: Needs
    ) -> Gradients:
        before, behind = factors(ffn.scale)
        if before is None:
            return backward(dy, x, ffn, kept, checkpoint_level, needs)
        inner = needs
        if needs.scale:
            weight, bias = _fed_by(ffn)
            inner = needs._replace(**{weight: True, bias: getattr(ffn, bias) is not None})
        found = backward(dy, x, _folded(x, ffn, before, behind), kept, checkpoint_level, inner)
        return _of_both(found, ffn, before, needs)

    return forward_of_both, backward_of_both


def _fed_by(ffn: FFN) -> tuple[str, str]:
    """Weight and bias of the projection whose outputs phi takes: the gate's, or the only one."""
    return ("w_in", "b_in") if ffn.w_gate is None else ("w_gate", "b_gate")


def _folded(x: Tensor, ffn: FFN, before: Tensor, behind: Tensor | None) -> FFN:
    """The block with the factor before phi folded into the projection that feeds it."""
    weight, bias = (getattr(ffn, name) for name in _fed_by(ffn))
    wide = torch.promote_types(torch.promote_types(weight.dtype, x.dtype), torch.float32)
    factor = before.to(wide)
    fed = (weight.to(wide) * factor.unsqueeze(1), None if bias is None else bias.to(wide) * factor)
    changed: dict[str, Any] = dict(zip(_fed_by(ffn), fed, strict=True))
    return dataclasses.replace(ffn, **changed, scale=behind)


def _of_both(found: Gradients, ffn: FFN, before: Tensor, needs: Needs) -> Gradients:
    """The gradients of the block, from those of the one that `_folded` makes of it."""
    names = _fed_by(ffn)
    weight, bias = (getattr(ffn, name) for name in names)
    dw, db = (getattr(found, name) for name in names)
    wide = weight.dtype if dw is None else dw.dtype
    changed: dict[str, Tensor | None] = {
        names[0]: (dw * before.to(wide).unsqueeze(1)).to(weight.dtype) if getattr(needs, names[0]) else None,
        names[1]: (db * before.to(db.dtype)).to(bias.dtype) if getattr(needs, names[1]) and db is not None else None,
    }
    if needs.scale and found.scale is not None and ffn.scale is not None:
        d_before = (dw * weight.to(wide)).sum(1)
        if db is not None:
            d_before = d_before + db.to(wide) * bias.to(wide)
        changed["scale"] = torch.stack([found.scale.to(wide), d_before]).to(ffn.scale.dtype)
    return found._replace(**changed)
