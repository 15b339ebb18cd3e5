"""How far one attention looks elsewhere than another, without keeping a map of either."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Entries of a map that are formed at once: a handful of such blocks, in float32, live at a time.
_ENTRIES = 2**22


@dataclass(frozen=True, eq=False)
class Scores:
    """What an attention's scores `scaling * query @ key^T` are made of.

    Attributes:
        query, key: `(batch, heads, tokens, head size)`.
        scaling: what the products are multiplied by.
        mask: broadcastable to `(batch, heads, tokens, tokens)`: boolean, True where a key may be looked at, or floats
            to add to the scores; None where all may.
    """

    query: Tensor
    key: Tensor
    scaling: float
    mask: Tensor | None = None

    def log_maps(self, query: Tensor, key: Tensor, part: tuple[slice, slice]) -> Tensor:
        """Logarithms of the attention probabilities of a part, whose query (scaled) and key are given."""
        scores = query @ key.mT
        if self.mask is not None:
            # An axis of one is shared by the entries that it stands for.
            shared = (slice(None) if size == 1 else at for at, size in zip(part, self.mask.shape[:2], strict=True))
            known = self.mask[tuple(shared)]
            if known.dtype == torch.bool:
                # Finite: of a row that may look at nothing comes a number that its weight of zero can still cancel.
                scores.masked_fill_(~known, torch.finfo(scores.dtype).min)
            else:
                scores += known
        return torch.log_softmax(scores, dim=-1)


def attention_divergence(
    student: Scores, teacher: Scores, rows: Tensor | None = None, *, entries: int = _ENTRIES
) -> Tensor:  # fmt: skip
    """Mean of `P_teacher (log P_teacher - log P_student)` over heads, kept rows and all their keys.

    `P` are attention probabilities as they are before dropout, so that two models that look at the same things have a
    divergence of zero. (MiniALBERT's published code, arXiv 2210.06425, takes them behind it.) Maps are formed for some
    heads at a time, in float32 at least, and forgotten: with respect to the student's scores, the gradient is
    `(P_student - P_teacher) / count`, linear in what comes from above, so that the one pass that forms the maps also
    gives the gradients of query and key, which are all that waits for the backward pass.

    Args:
        student, teacher: with the same batch, heads and tokens. The teacher's get no gradient.
        rows: `(batch, tokens)` boolean, the tokens whose rows count; None for all. Without any the mean is zero.
        entries: of one map, that are formed at once. One row of the batch and one head is the least.

    Returns:
        A scalar of the query's dtype, float32 for narrower ones.

    Raises:
        ValueError: the shapes do not agree.
        RuntimeError: it is differentiated twice (`create_graph`).
    """
    shapes = [tuple(tensor.shape[:3]) for tensor in (student.query, student.key, teacher.query, teacher.key)]
    if len(set(shapes)) > 1:
        raise ValueError(f"queries and keys of {' and '.join(map(str, sorted(set(shapes))))} (batch, heads, tokens)")
    divergence: Tensor = _Divergence.apply(student.query, student.key, student, teacher, rows, entries)  # type: ignore[no-untyped-call]
    return divergence


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, student: Scores, teacher: Scores, rows: Tensor | None, entries: int
    ) -> Tensor:
        batch, heads, tokens = query.shape[:3]
        dtype = torch.promote_types(query.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=query.device)
        learns = any(ctx.needs_input_grad[:2])
        gradients = [torch.zeros_like(query), torch.zeros_like(key)] if learns else []
        # Under autocast these products would be rounded to 16 bits before the softmax.
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            for part in _parts(batch, heads, max(1, entries // max(1, tokens * tokens))):
                q, k = query[part].to(dtype) * student.scaling, key[part].to(dtype)
                wanted_q, wanted_k = teacher.query[part].to(dtype) * teacher.scaling, teacher.key[part].to(dtype)
                found, wanted = student.log_maps(q, k, part), teacher.log_maps(wanted_q, wanted_k, part)
                p = wanted.exp()
                kept = None if rows is None else rows[part[0], None, :, None].to(dtype)
                # Where the teacher never looks nothing is lost, whatever the student's logarithm is.
                lost = torch.where(p > 0, p * (wanted - found), 0.0)
                total += lost.sum() if kept is None else (lost * kept).sum()
                if learns:
                    slope = found.exp_().sub_(p)
                    if kept is not None:
                        slope *= kept
                    gradients[0][part] = ((slope @ k) * student.scaling).to(query.dtype)
                    gradients[1][part] = (slope.mT @ q).to(key.dtype)
            looking = batch * tokens if rows is None else rows.sum()
            count = torch.as_tensor(looking * (heads * tokens), dtype=dtype, device=query.device).clamp(min=1)
        # Not yet divided by the count: in 16 bits, entries of the mean's gradient would vanish.
        ctx.save_for_backward(count, *gradients)
        return total / count

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        # `once_differentiable` looks at `above` alone, which is no function of query and key: their second derivatives
        # would be left out in silence.
        if torch.is_grad_enabled():
            raise RuntimeError("attention_divergence is differentiated once: leave out create_graph")
        count, *gradients = ctx.saved_tensors
        weight = above / count
        found = [(gradient.to(weight.dtype) * weight).to(gradient.dtype) for gradient in gradients]
        return (*(found or (None, None)), None, None, None, None)


def _parts(batch: int, heads: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Slices of batch and heads that hold `most` maps, and one at least."""
    some = min(heads, most)
    rows = max(1, most // heads)
    for row in range(0, batch, rows):
        for head in range(0, heads, some):
            yield slice(row, row + rows), slice(head, head + some)
