"""What of a call decides which backend of blocks is fastest on a GPU, and what measurements say about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """One call of an operator on blocks.

    Attributes:
        tokens: rows of x.
        d: columns of x.
        h: neurons.
        d_out: columns of y.
        gated: whether there is a gate projection.
        checkpoint_level: what is saved for the backward: 0 z and a, 1 z, 2 nothing (also where there is no backward).
        experts: how many blocks side by side; None for one.
    """

    tokens: int
    d: int
    h: int
    d_out: int
    gated: bool
    checkpoint_level: int
    experts: int | None = None

    @property
    def trained(self) -> bool:
        """Whether hidden tensors are saved, and so a backward follows."""
        return self.checkpoint_level < 2


#: What was measured on one GPU: :func:`subject` -> [(fewest tokens, backend), ...] in rising order of tokens.
Table = Mapping[str, list[tuple[int, str]]]


def subject(dtype: torch.dtype, shape: Shape, activation: str) -> str:
    """Everything but tokens that a measurement is about, as files name it."""
    parts = [
        "mlp" if shape.experts is None else f"experts {shape.experts}",
        str(dtype).removeprefix("torch."),
        f"d {shape.d} h {shape.h} out {shape.d_out}",
        f"{'gated ' if shape.gated else ''}{activation}",
        "trained" if shape.trained else "forward",
    ]
    return ", ".join(parts)


def bucket(tokens: int) -> int:
    """The power of two that measurements of so many tokens go under: the largest that is not more."""
    return 1 << (tokens.bit_length() - 1) if tokens > 0 else 0


def path(rows: list[tuple[int, str]], tokens: int, default: str) -> str:
    """The backend that was fastest at the next smaller measured token count; `default` where nothing was measured.

    Args:
        rows: an entry of :data:`Table`.
        tokens: of the call.
        default: what runs without measurements.
    """
    return next((backend for fewest, backend in reversed(rows) if tokens >= fewest), default)
