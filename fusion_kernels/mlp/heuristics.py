"""Which path a block takes on a GPU: a pure function of shapes, so that nothing is tuned while a program runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """One call of the operator.

    Attributes:
        tokens: T, rows of x.
        d: columns of x.
        h: neurons.
        d_out: columns of y.
        gated: whether there is a gate projection.
        checkpoint_level: what is saved for the backward: 0 z and a, 1 z, 2 nothing (also where there is no backward).
    """

    tokens: int
    d: int
    h: int
    d_out: int
    gated: bool
    checkpoint_level: int


#: (GPU name, dtype, d, h, gated, saves hidden tensors) -> [(fewest tokens, backend), ...] in rising order of tokens,
#: from `bench/fused_mlp.py`.
Table = dict[tuple[str, torch.dtype, int, int, bool, bool], list[tuple[int, str]]]
MEASURED: Table = {}

#: What a GPU runs that has not been measured: torch's own operations, whose speed is known.
UNMEASURED = "torch"


def path(gpu: str, dtype: torch.dtype, shape: Shape, table: Table | None = None) -> str:
    """The backend of `fusion_kernels.mlp` for one call on a GPU.

    It is the one that was fastest at this width and the next smaller measured token count, :data:`UNMEASURED` where
    nothing was measured.

    Args:
        gpu: the name that `torch.cuda.get_device_name` gives.
        dtype: that of the computation.
        table: what was measured; :data:`MEASURED` when None.
    """
    table = MEASURED if table is None else table
    rows = table.get((gpu, dtype, shape.d, shape.h, shape.gated, shape.checkpoint_level < 2), [])
    return next((backend for tokens, backend in reversed(rows) if shape.tokens >= tokens), UNMEASURED)
