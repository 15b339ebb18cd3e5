"""Sums over two tangent kernels on GPUs, strip by strip.

Both kernels' strips are computed by the tiles, side by side in memory that the next strips use again, and added up in
one order: one program with the accumulators of two kernels would need more registers than there are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusion_kernels.ntk import heuristics
from fusion_kernels.ntk.passes import Products, left_and_right
from fusion_kernels.ntk.types import Differentiated

#: Columns of a strip that one program adds up.
COLUMNS = 128


def precision_of(dtype: torch.dtype) -> str:
    """What strips are computed in: of float32 by the products of tensor cores whose errors are float32's."""
    return "tf32x3" if dtype == torch.float32 else "highest"


def sums_by_strips(
    x1: Tensor,
    x2: Tensor | None,
    a: Differentiated,
    b: Differentiated,
    kernel: str,
    direction: Tensor | None,
    block_size: int | None,
    *,
    operand: Callable[..., Tensor],
    tiles: Callable[[Tensor, Tensor, Products, Tensor], None],
    add: Callable[..., None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums over two kernels; arguments and result as in `fusion_kernels.ntk.reference.ntk_sums`.

    Args:
        block_size: rows of a strip; None: as many as keep both within `ROW_BLOCK_BYTES`.
        operand: as `left_and_right` takes it.
        tiles: writes the products of rows and others, as they say, to where they are told, or adds them to it.
        add: told two strips (n, m), the number of the first row, whether they are of symmetric kernels, of which only
            what is on and below the diagonal is read; adds to sums (groups of `COLUMNS`, 4), to rows (2, n) and to
            columns (2, at least m), where a symmetric kernel adds what is below the diagonal.
    """
    precision = precision_of(x1.dtype)
    passes = [list(left_and_right(operand, x1, x2, *block, kernel, direction, precision)) for block in (a, b)]
    n1, n2 = len(x1), len(x1 if x2 is None else x2)
    symmetric = x2 is None and kernel == "gd"
    step = heuristics.row_block(2 * n2 * x1.element_size()) if block_size is None else block_size
    # Not one piece of memory, whose second half might begin anywhere.
    strips = [x1.new_empty(min(step, n1) * n2) for _ in range(2)]
    sums = x1.new_zeros(-(-n2 // COLUMNS), 4, dtype=torch.float64)
    rows, columns = (x1.new_zeros(2, n, dtype=torch.float64) for n in (n1, n2))
    for begin in range(0, n1 if n2 else 0, step):
        end = min(begin + step, n1)
        width = end if symmetric else n2
        pair = [strip[: (end - begin) * width].view(end - begin, width) for strip in strips]
        for strip, of_one in zip(pair, passes, strict=True):
            for one, other, how in of_one:
                tiles(one[:, begin:end], other[:, :width], how, strip)
        add(*pair, begin, symmetric, sums, rows[:, begin:end], columns)
    if symmetric:
        rows += columns
        columns = rows.clone()
    return sums.sum(0), rows, columns
