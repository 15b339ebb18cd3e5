"""Blocks of many experts on rows that are sorted by expert: the specification of `fusion_kernels::experts`.

Expert e computes the block of `fusion_kernels.mlp.reference` on rows [ends[e - 1], ends[e]) with the e-th of every
weight; rows from ends[-1] on belong to no expert here and give zeros.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusion_kernels.ffn import FFN, TENSORS
from fusion_kernels.mlp.reference import mlp, mlp_backward
from fusion_kernels.mlp.types import Gradients, Needs


def spans(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for every expert that has any; waits for the device of `ends`."""
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        if end > begin:
            yield expert, slice(begin, end)
        begin = end


def experts(x: Tensor, ends: Tensor, ffn: FFN) -> Tensor:
    """Return y (S, d_out) in the dtype of x, by differentiable torch operations.

    Args:
        x: (S, d), sorted by expert.
        ends: (E,) integers, where the rows of each expert end; not falling.
        ffn: its tensors with an axis of E experts before the others; a scale is (E, N).
    """
    parts = [mlp(x[rows], ffn.at(expert)) for expert, rows in spans(ends)]
    return _with_zeros(parts, x, ffn.w_out.shape[2])


def experts_backward(dy: Tensor, x: Tensor, ends: Tensor, ffn: FFN, needs: Needs) -> Gradients:
    """Return the gradients of `experts` for dy (S, d_out); an expert without rows has zeros."""
    found = {expert: mlp_backward(dy[rows], x[rows], ffn.at(expert), needs) for expert, rows in spans(ends)}

    def of_experts(field: str, weight: Tensor | None) -> Tensor | None:
        if weight is None or not getattr(needs, field):
            return None
        parts = [getattr(found[e], field) if e in found else torch.zeros_like(weight[e]) for e in range(len(weight))]
        return torch.stack(parts)

    dx = _with_zeros([part.x for part in found.values()], x, x.shape[1]) if needs.x else None  # type: ignore[misc]
    return Gradients(dx, *(of_experts(field, t) for field, t in zip(TENSORS, ffn.tensors, strict=True)))


def _with_zeros(parts: list[Tensor], x: Tensor, columns: int) -> Tensor:
    """The rows of all experts, and zeros for those of x that belong to none."""
    return torch.cat([*parts, x.new_zeros(len(x) - sum(map(len, parts)), columns)])
