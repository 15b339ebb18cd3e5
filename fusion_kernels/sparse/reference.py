"""Some entries of gᵀ x: the specification of `fusion_kernels::sampled_product`."""

from __future__ import annotations

import torch
from torch import Tensor


def sums_of(dtype: torch.dtype) -> torch.dtype:
    """What sums over tokens are in, and the result: float32, of float64 float64."""
    return torch.promote_types(dtype, torch.float32)


def sampled_product(g: Tensor, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return (k,) of gᵀ x at (rows, columns), by way of the whole (N, d) product.

    Args:
        g: (T, N).
        x: (T, d) in the dtype of g.
        rows: (k,) integers in [0, N).
        columns: (k,) integers in [0, d).
    """
    wide = sums_of(g.dtype)
    return (g.to(wide).T @ x.to(wide))[rows.long(), columns.long()]
