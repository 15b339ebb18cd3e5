"""Outer products taken from matrices, or multiplied into them, a few rows at a time."""

from __future__ import annotations

import pytest
import torch

from mlp_fusion.calibration.outer import multiply_outer, subtract_outer


@pytest.mark.parametrize("shape", [(1, 1), (256, 3), (257, 300), (700, 17), (0, 4)])
def test_they_are_those_of_torch(shape: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(0)
    matrix, column, row = (torch.randn(size, generator=g).double() for size in (shape, shape[:1], shape[1:]))
    kept = column.clone(), row.clone()
    for change, expected in (
        (subtract_outer, matrix - torch.outer(column, row)),
        (multiply_outer, matrix * torch.outer(column, row)),
    ):
        found = matrix.clone()
        change(found, column, row)
        assert torch.equal(found, expected)
    assert torch.equal(column, kept[0])
    assert torch.equal(row, kept[1])


def test_symmetric_matrices_stay_so() -> None:
    rows = torch.randn(600, 300, generator=torch.Generator().manual_seed(0)).double()
    gram, vector = rows.T @ rows, rows[0]
    gram = (gram + gram.T) / 2
    for change in (subtract_outer, multiply_outer):
        change(gram, vector, vector)
        assert torch.equal(gram, gram.T)
