"""Expert by expert, each by the backend that answers (or is pinned) for a single block.

On a GPU this waits for the ends of the rows, which a CUDA graph cannot record.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusion_kernels.experts.reference import spans
from fusion_kernels.ffn import FFN
from fusion_kernels.mlp import mlp_backend
from fusion_kernels.mlp.operators import MLP, new_gradients
from fusion_kernels.mlp.types import Gradients, Needs, Outputs, Saved


def forward(x: Tensor, ends: Tensor, ffn: FFN, checkpoint_level: int) -> Outputs:
    """See `fusion_kernels.mlp.operators`."""
    S, neurons = len(x), ffn.w_in.shape[1]
    kept = checkpoint_level < 2
    y = x.new_zeros(S, ffn.w_out.shape[2])
    z = x.new_zeros((S, neurons) if kept else (0,))
    g = x.new_zeros((S, neurons) if kept and ffn.gated else (0,))
    a = x.new_zeros((S, neurons) if checkpoint_level == 0 else (0,))
    for expert, rows in _experts(ends):
        one, block = x[rows], ffn.at(expert)
        found = MLP.functions((one,), block, checkpoint_level, mlp_backend.name).forward(one, block, checkpoint_level)
        for whole, part in zip((y, z, g, a), found, strict=True):
            if len(whole):
                whole[rows] = part
    return y, z, g, a


def backward(
    dy: Tensor, x: Tensor, ends: Tensor, ffn: FFN, kept: Saved, checkpoint_level: int, needs: Needs
) -> Gradients:
    """See `fusion_kernels.mlp.operators`."""
    # An expert without rows has gradients of zero.
    totals = Gradients(*(None if t is None else t.zero_() for t in new_gradients(x, ffn, needs)))
    for expert, rows in _experts(ends):
        one, block, (z, g, a) = x[rows], ffn.at(expert), (t[rows] if len(t) else t for t in kept)
        run = MLP.functions((one,), block, checkpoint_level, mlp_backend.name).backward
        found = run(dy[rows], one, block, (z, g, a), checkpoint_level, needs)
        places: tuple[slice | int, ...] = (rows, *(expert for _ in ffn.tensors))
        for total, part, where in zip(totals, found, places, strict=True):
            if total is not None and part is not None:
                total[where] = part
    return totals


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
