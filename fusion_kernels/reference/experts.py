"""Blocks of many experts on rows that are sorted by expert: the specification of `fusion_kernels::experts`.

Expert e computes the block of `fusion_kernels.reference.mlp` on rows [ends[e - 1], ends[e]) with the e-th of every
weight; rows from ends[-1] on belong to no expert here and give zeros.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusion_kernels.reference import mlp as reference


def spans(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for every expert that has any; waits for the device of `ends`."""
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        if end > begin:
            yield expert, slice(begin, end)
        begin = end


def experts(
    x: Tensor,
    ends: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    scale: Tensor | None,
    activation: str,
) -> Tensor:
    """Return y (S, d_out) in the dtype of x, by differentiable torch operations.

    Args:
        x: (S, d), sorted by expert.
        ends: (E,) integers, where the rows of each expert end; not falling.
        w_in: (E, h, d); the up projections of gated blocks.
        b_in: (E, h).
        w_gate: (E, h, d).
        b_gate: (E, h).
        w_out: (E, d_out, h).
        b_out: (E, d_out).
        scale: (E, h), of a floating-point or integer dtype.
        activation: name of phi in `fusion_kernels.activations`.
    """
    parts = []
    total = 0
    for expert, rows in spans(ends):
        b1, b2, b3, p = (None if t is None else t[expert] for t in (b_in, b_gate, b_out, scale))
        gate = None if w_gate is None else w_gate[expert]
        block = reference.Block(w_in[expert], b1, gate, b2, w_out[expert], b3, p, activation)
        parts.append(reference.mlp(x[rows], block))
        total = rows.stop
    return torch.cat([*parts, x.new_zeros(len(x) - total, w_out.shape[1])])
