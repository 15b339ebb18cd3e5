"""Expert by expert, each by the backend that answers (or is pinned) for a single block.

On a GPU this waits for the ends of the rows, which a CUDA graph cannot record.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fusion_kernels.experts.reference import spans
from fusion_kernels.mlp import mlp_backend
from fusion_kernels.mlp import operators as mlp
from fusion_kernels.mlp.operators import Gradients, Outputs, Saved, packed
from fusion_kernels.mlp.reference import Block


def forward(x: Tensor, ends: Tensor, block: Block, checkpoint_level: int) -> Outputs:
    """See `fusion_kernels.experts.operators`."""
    S, h = len(x), block.w_in.shape[1]
    kept = checkpoint_level < 2
    y = x.new_zeros(S, block.w_out.shape[1])
    z = x.new_zeros((S, h) if kept else (0,))
    g = x.new_zeros((S, h) if kept and block.w_gate is not None else (0,))
    a = x.new_zeros((S, h) if checkpoint_level == 0 else (0,))
    for expert, rows in _experts(ends):
        found = mlp.forward(x[rows], block.expert(expert), checkpoint_level, mlp_backend.name)
        for whole, part in zip((y, z, g, a), found, strict=True):
            if len(whole):
                whole[rows] = part
    return y, z, g, a


def backward(
    dy: Tensor, x: Tensor, ends: Tensor, block: Block, kept: Saved, checkpoint_level: int, needs: Sequence[bool]
) -> Gradients:
    """See `fusion_kernels.experts.operators`."""
    # An expert without rows has gradients of zero.
    totals = [
        t.new_zeros(t.shape) if need and t is not None else None
        for t, need in zip((x, *block.tensors), needs, strict=True)
    ]  # fmt: skip
    for expert, rows in _experts(ends):
        z, g, a = (t[rows] if len(t) else t for t in kept)
        found = mlp.backward(
            dy[rows], x[rows], block.expert(expert), (z, g, a), checkpoint_level, mlp_backend.name, needs
        )
        places: tuple[slice | int, ...] = (rows, *(expert for _ in block.tensors))
        for total, part, where in zip(totals, found, places, strict=True):
            if total is not None and part is not None:
                total[where] = part
    return packed(x, totals)


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
