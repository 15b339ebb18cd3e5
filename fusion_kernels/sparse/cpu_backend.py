"""Entries of gᵀ x as so many dot products, of columns that are laid out side by side, some tokens at a time."""

from __future__ import annotations

from torch import Tensor

from fusion_kernels import native


def sampled_product(g: Tensor, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """See `fusion_kernels.sparse`."""
    found: Tensor = native.operators().sampled_product.default(g, x, rows.contiguous(), columns.contiguous())
    return found
