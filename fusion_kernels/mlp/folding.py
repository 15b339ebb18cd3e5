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

    The factor is folded into the projection that feeds phi, and into the up projection where that is limited.
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
            asked = {name: getattr(ffn, name) is not None for pair in _multiplied(ffn) for name in pair}
            inner = needs._replace(**asked)
        found = backward(dy, x, _folded(x, ffn, before, behind), kept, checkpoint_level, inner)
        return _of_both(found, ffn, before, needs)

    return forward_of_both, backward_of_both


def _multiplied(ffn: FFN) -> list[tuple[str, str]]:
    """Weight and bias of the projections that the factor before phi multiplies: see `FFN.scale`."""
    up, gate = ("w_in", "b_in"), ("w_gate", "b_gate")
    return [up] if not ffn.gated else [gate] if ffn.up_multiplies else [gate, up]


def _folded(x: Tensor, ffn: FFN, before: Tensor, behind: Tensor | None) -> FFN:
    """The block with the factor before phi folded into what it multiplies."""
    wide = torch.promote_types(torch.promote_types(ffn.w_in.dtype, x.dtype), torch.float32)
    factor, changed = before.to(wide), dict[str, Any]()
    for weight, bias in _multiplied(ffn):
        w, b = getattr(ffn, weight), getattr(ffn, bias)
        changed |= {weight: w.to(wide) * factor.unsqueeze(1), bias: None if b is None else b.to(wide) * factor}
    return dataclasses.replace(ffn, **changed, scale=behind)


def _of_both(found: Gradients, ffn: FFN, before: Tensor, needs: Needs) -> Gradients:
    """The gradients of the block, from those of the one that `_folded` makes of it."""
    changed: dict[str, Tensor | None] = {}
    d_before: list[Tensor] = []
    for names in _multiplied(ffn):
        weight, bias = (getattr(ffn, name) for name in names)
        dw, db = (getattr(found, name) for name in names)
        wide = weight.dtype if dw is None else dw.dtype
        needed = [getattr(needs, name) for name in names]
        changed |= {
            names[0]: (dw * before.to(wide).unsqueeze(1)).to(weight.dtype) if needed[0] else None,
            names[1]: (db * before.to(db.dtype)).to(bias.dtype) if needed[1] and db is not None else None,
        }
        if needs.scale:
            d_before.append((dw * weight.to(wide)).sum(1))
            if db is not None:
                d_before.append(db.to(wide) * bias.to(wide))
    if needs.scale and found.scale is not None and ffn.scale is not None:
        total = torch.stack(d_before).sum(0)
        changed["scale"] = torch.stack([found.scale.to(total.dtype), total]).to(ffn.scale.dtype)
    return found._replace(**changed)
