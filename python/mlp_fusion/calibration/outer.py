"""Outer products taken from large matrices, or multiplied into them, without a third matrix of their size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Rows that an outer product is made of at a time.
_ROWS = 256


def subtract_outer(matrix: Tensor, column: Tensor, row: Tensor) -> None:
    """`matrix -= column row^T` in place, for `(N, M)`, `(N,)` and `(M,)`."""
    for rows, product in _products(matrix, column, row):
        rows -= product


def multiply_outer(matrix: Tensor, column: Tensor, row: Tensor) -> None:
    """`matrix *= column row^T` entry by entry, in place, for `(N, M)`, `(N,)` and `(M,)`: symmetric ones stay so."""
    for rows, product in _products(matrix, column, row):
        rows *= product


def _products(matrix: Tensor, column: Tensor, row: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for rows, own in zip(matrix.split(_ROWS), column.split(_ROWS), strict=True):
        yield rows, torch.outer(own, row)
