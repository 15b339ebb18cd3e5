"""Expert by expert, each by the backend that answers (or is pinned) for a single block, on its own tokens.

On a GPU this waits for the ends of the rows, which a CUDA graph cannot record.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusion_kernels.experts.operators import tokens_of
from fusion_kernels.experts.reference import spans, sum_of_choices
from fusion_kernels.ffn import FFN
from fusion_kernels.mlp import mlp_backend
from fusion_kernels.mlp.operators import MLP, new_gradients
from fusion_kernels.mlp.types import Gradients, Needs, Outputs, Saved


def forward(x: Tensor, order: Tensor, ends: Tensor, ffn: FFN, checkpoint_level: int) -> Outputs:
    """See `fusion_kernels.mlp.operators`."""
    S, neurons, tokens = len(order), ffn.w_in.shape[1], tokens_of(order, x)
    kept = checkpoint_level < 2
    y = x.new_zeros(S, ffn.w_out.shape[2])
    z = x.new_zeros((S, neurons) if kept else (0,))
    g = x.new_zeros((S, neurons) if kept and ffn.gated else (0,))
    a = x.new_zeros((S, neurons) if checkpoint_level == 0 else (0,))
    for expert, rows in _experts(ends):
        one, block = x.index_select(0, tokens[rows]), ffn.at(expert)
        part, *hidden = MLP.functions((one,), block, checkpoint_level, mlp_backend.name).forward(
            one, block, checkpoint_level
        )
        y.index_copy_(0, order[rows], part)
        for whole, part in zip((z, g, a), hidden, strict=True):
            if len(whole):
                whole[rows] = part
    return y, z, g, a


def backward(
    dy: Tensor, x: Tensor, order: Tensor, ends: Tensor, ffn: FFN, kept: Saved, checkpoint_level: int, needs: Needs
) -> Gradients:
    """See `fusion_kernels.mlp.operators`."""
    # An expert without rows has gradients of zero.
    totals = Gradients(*(None if t is None else t.zero_() for t in new_gradients(x, ffn, needs._replace(x=False))))
    dx, tokens = x.new_zeros(len(order), x.shape[1]) if needs.x else None, tokens_of(order, x)
    for expert, rows in _experts(ends):
        one, given = x.index_select(0, tokens[rows]), dy.index_select(0, order[rows])
        block, (z, g, a) = ffn.at(expert), (t[rows] if len(t) else t for t in kept)
        run = MLP.functions((one,), block, checkpoint_level, mlp_backend.name).backward
        found = run(given, one, block, (z, g, a), checkpoint_level, needs)
        if dx is not None and found.x is not None:
            dx.index_copy_(0, order[rows], found.x)
        for total, part in zip(totals[1:], found[1:], strict=True):
            if total is not None and part is not None:
                total[expert] = part
    return totals if dx is None else totals._replace(x=sum_of_choices(dx, x))


def _experts(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, with their rows.

    Raises:
        RuntimeError: a CUDA graph is being recorded.
    """
    if ends.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "experts one by one need the ends of their rows on the host, which a CUDA graph cannot record: "
            "use experts_backend('triton') or, for bfloat16 on Hopper, experts_backend('grouped_mm')"
        )
    return spans(ends)
