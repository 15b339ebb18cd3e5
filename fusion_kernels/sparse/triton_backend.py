"""Entries of gᵀ x as so many dot products on a GPU: g and x are transposed, so that each one reads two rows.

Triton is imported when it is first called.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_kernels.gpu import device_guard, launch

#: Entries of a program, and tokens at a time: rows are read by 16 bytes a thread.
ENTRIES, TOKENS = 8, 256


def takes(dtype: torch.dtype) -> str | None:
    """None, or why not this dtype."""
    return "it sums in float32: float64 is for the reference" if dtype == torch.float64 else None


def sampled_product(g: Tensor, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """See `fusion_kernels.sparse`."""
    from fusion_kernels.sparse import _triton_sampled as kernels

    left, right = _transposed(g), _transposed(x)
    out = torch.empty(len(rows), dtype=torch.float32, device=g.device)
    if len(rows) == 0:
        return out
    with device_guard(g):
        launch(
            kernels._sampled_kernel,
            -(-len(rows) // ENTRIES),
            left_ptr=left,
            right_ptr=right,
            rows_ptr=rows.contiguous(),
            columns_ptr=columns.contiguous(),
            out_ptr=out,
            T=len(g),
            count=len(rows),
            left_stride=left.stride(0),
            right_stride=right.stride(0),
            BE=ENTRIES,
            BT=TOKENS,
            num_warps=4,
            num_stages=2,
        )
    return out


def _transposed(x: Tensor) -> Tensor:
    """x (T, n) as (n, T) with contiguous rows that begin at multiples of 16 bytes."""
    T, n = x.shape
    padded = torch.empty(n, -(-max(T, 1) // 8) * 8, dtype=x.dtype, device=x.device)
    padded[:, :T] = x.T
    return padded[:, :T]
