"""Blocks of many experts on rows that are sorted by expert: the specification of `fusion_kernels::experts`.

Expert e computes the block of `fusion_kernels.mlp.reference` on rows [ends[e - 1], ends[e]) with the e-th of every
weight; rows from ends[-1] on belong to no expert here and give zeros.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusion_kernels.mlp.reference import Block, mlp


def spans(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for every expert that has any; waits for the device of `ends`."""
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        if end > begin:
            yield expert, slice(begin, end)
        begin = end


def experts(x: Tensor, ends: Tensor, block: Block) -> Tensor:
    """Return y (S, d_out) in the dtype of x, by differentiable torch operations.

    Args:
        x: (S, d), sorted by expert.
        ends: (E,) integers, where the rows of each expert end; not falling.
        block: its tensors with an axis of E experts before the others; a scale is (E, h).
    """
    parts = []
    total = 0
    for expert, rows in spans(ends):
        parts.append(mlp(x[rows], block.expert(expert)))
        total = rows.stop
    return torch.cat([*parts, x.new_zeros(len(x) - total, block.w_out.shape[1])])
