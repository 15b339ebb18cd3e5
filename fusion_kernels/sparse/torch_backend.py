"""Entries of gᵀ x out of whole products of a few rows each: fast where many entries are asked for, on any device.

No more than a block of the product exists at a time, and nothing here waits for a GPU to learn how many entries a block
has: every block is asked for all of them, and gives those that lie in it. On a GPU, products of 16-bit numbers are
rounded to 16 bits, as a gradient by autograd is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_kernels.sparse.heuristics import block_rows
from fusion_kernels.sparse.reference import sums_of


def sampled_product(g: Tensor, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """See `fusion_kernels.sparse`."""
    (T, N), d, wide = g.shape, x.shape[1], sums_of(g.dtype)
    found = torch.zeros(len(rows), dtype=wide, device=g.device)
    if T == 0 or len(rows) == 0:
        return found
    # Products of 16-bit numbers on the CPU may be summed in 16 bits from one block of tokens to the next.
    if g.device.type == "cpu":
        g, x = g.to(wide), x.to(wide)
    rows, columns = rows.long(), columns.long()
    step = block_rows(N, d)
    for begin in range(0, N, step):
        product = g[:, begin : begin + step].T @ x
        inside = (rows >= begin) & (rows < begin + step)
        at = (rows - begin).clamp(0, len(product) - 1)
        found = torch.where(inside, product[at, columns].to(wide), found)
    return found
