"""Blocks of many experts on routed tokens: the specification of `fusion_kernels::experts`.

Token t has k choices, numbered t * k to t * k + k - 1, and every choice is a row that one expert computes. `order`
lists all choices by expert: row i of the hidden tensors is choice `order[i]`, and its input is token `order[i] // k`.
Expert e computes the block of `fusion_kernels.mlp.reference` on rows [ends[e - 1], ends[e]) with the e-th of every
weight; rows from ends[-1] on belong to no expert here and give zeros. Results lie in the order of the choices.
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


def choices(x: Tensor, order: Tensor) -> int:
    """k: how many choices each token of x has; 0 where there are no tokens."""
    return order.shape[0] // max(1, x.shape[0])


def experts(x: Tensor, order: Tensor, ends: Tensor, ffn: FFN) -> Tensor:
    """Return y (S, d_out) in the dtype of x and the order of the choices, by differentiable torch operations.

    Args:
        x: (T, d) tokens.
        order: (S,) int64, the choices 0 to S - 1 sorted by expert; S = T k.
        ends: (E,) integers, where the rows of each expert end; not falling.
        ffn: its tensors with an axis of E experts before the others; a scale is (E, N).
    """
    rows = _sorted_rows(x, order)
    parts = [mlp(rows[own], ffn.at(expert)) for expert, own in spans(ends)]
    return _with_zeros(parts, rows, ffn.w_out.shape[2])[order.argsort()]


def experts_backward(dy: Tensor, x: Tensor, order: Tensor, ends: Tensor, ffn: FFN, needs: Needs) -> Gradients:
    """Return the gradients of `experts` for dy (S, d_out); an expert without rows has zeros."""
    rows, given = _sorted_rows(x, order), dy[order]
    found = {expert: mlp_backward(given[own], rows[own], ffn.at(expert), needs) for expert, own in spans(ends)}

    def of_experts(field: str, weight: Tensor | None) -> Tensor | None:
        if weight is None or not getattr(needs, field):
            return None
        parts = [getattr(found[e], field) if e in found else torch.zeros_like(weight[e]) for e in range(len(weight))]
        return torch.stack(parts)

    dx = None
    if needs.x:
        parts = [part.x for part in found.values() if part.x is not None]
        dx = sum_of_choices(_with_zeros(parts, rows, x.shape[1])[order.argsort()], x)
    return Gradients(dx, *(of_experts(field, t) for field, t in zip(TENSORS, ffn.tensors, strict=True)))


def sum_of_choices(values: Tensor, x: Tensor) -> Tensor:
    """(T, n) sums of the k rows of each token of x, of values (S, n) in the order of the choices: always that order."""
    k = choices(x, values)
    return values if k == 1 else values.view(x.shape[0], k, values.shape[1]).sum(1)


def _sorted_rows(x: Tensor, order: Tensor) -> Tensor:
    """The token of every row: each token k times, so that its gradient is summed in the order of the choices."""
    return x.repeat_interleave(choices(x, order), 0)[order]


def _with_zeros(parts: list[Tensor], rows: Tensor, columns: int) -> Tensor:
    """The results of all experts, and zeros for the rows that belong to none."""
    return torch.cat([*parts, rows.new_zeros(len(rows) - sum(map(len, parts)), columns)])
