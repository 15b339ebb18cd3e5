"""Which path a block of some shape takes on a GPU: what was measured, and what the roofline predicts before that.

Pure functions of shapes, so that the choice can be tested anywhere and nothing is tuned while a program runs.
"""

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
#: from `bench/fused_mlp.py`. Empty until a GPU has been measured: the block then runs as torch's own operations.
MEASURED: dict[tuple[str, torch.dtype, int, int, bool, bool], list[tuple[int, str]]] = {}


def measured(gpu: str, dtype: torch.dtype, shape: Shape) -> str | None:
    """The backend that was fastest on this GPU at this width and the next smaller measured token count, or None."""
    rows = MEASURED.get((gpu, dtype, shape.d, shape.h, shape.gated, shape.checkpoint_level < 2), [])
    return next((backend for tokens, backend in reversed(rows) if shape.tokens >= tokens), None)


#: Widest hidden layer whose tile stays on the chip beside double-buffered operands, and the tokens per program.
RESIDENT_WIDTH = 256
RESIDENT_TOKENS = 128
#: Share of cuBLAS' speed that a Triton product reaches, assumed until it is measured.
TRITON_EFFICIENCY = 0.85


def break_even(d: int, bytes_per_flop_balance: float, passes: int) -> float:
    """The share of cuBLAS' speed above which a fused epilogue saves time.

    A product over d of a (T, h) output takes 2 T h d operations; each pass over the hidden tensor that the epilogue
    saves moves 2 T h bytes, read or written. Fusing wins when the product's loss is below the passes' time, that is
    for an efficiency above 1 / (1 + passes * balance / d).

    Args:
        d: inner dimension of the product.
        bytes_per_flop_balance: operations per byte at which the GPU's arithmetic and memory are even.
        passes: reads and writes of a (T, h) tensor in two bytes per element that are saved.
    """
    return 1.0 / (1.0 + passes * bytes_per_flop_balance / d)


def predicted(shape: Shape, processors: int = 132, balance: float = 184.0) -> str:
    """The path that the roofline of a GPU favours, `"resident"`, `"epilogue"` or `"cublas"`.

    Args:
        processors: multiprocessors of the GPU (132 on an H200).
        balance: half-precision operations per byte at which arithmetic and memory are even (184 on an H200).
    """
    fills = shape.tokens >= processors * RESIDENT_TOKENS
    if shape.checkpoint_level == 2 and shape.h <= RESIDENT_WIDTH and fills:
        return "resident"
    # The forward saves the activation's read and, at level 2, z is not written either; the backward twice as much.
    return "epilogue" if break_even(shape.d, balance, 2) < TRITON_EFFICIENCY else "cublas"
