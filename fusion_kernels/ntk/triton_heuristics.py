"""Shapes to launch configurations for the Triton kernel of tangent kernels: pure functions, nothing is timed."""

from __future__ import annotations

from dataclasses import replace

import torch

from fusion_kernels.kmeans.triton_heuristics import GramConfig, gram_config, round_up

#: Every range of an operand's columns is padded to a multiple of this: whole steps, and wide, aligned loads.
COLUMNS = 64


def padded(columns: int) -> int:
    """How many columns a range of so many takes."""
    return round_up(columns, COLUMNS)


def tile_config(
    rows: int, precision: str, dtype: torch.dtype, accumulate: bool, shared_memory: int, major: int
) -> GramConfig:
    """For a kernel of at most `rows` rows and columns.

    Two accumulators and a partial sum of 128 x 128 fill the registers of 8 warps, as operands in two planes fill shared
    memory: tiles for tensor cores are those of the exact Gram matrices of k-means. Without them it is multiply-adds
    that take time, and a few smaller tiles on a multiprocessor hide how long loads take.

    Args:
        accumulate: what is added to, and where it lies, takes as many registers again: tiles are those for little
            shared memory.
        major: of the GPU's compute capability. On 10.x tensor cores accumulate in a memory of their own, and to add two
            tiles up takes more registers than there are, likewise.
    """
    of_gram = gram_config(rows, True, 0 if accumulate or major == 10 else shared_memory)
    if precision == "highest":
        edge = min(64, of_gram.tile[0])
        if dtype == torch.float64:
            # Four warps spill what is added to.
            return GramConfig((edge, edge), 16, 8 if accumulate and edge > 32 else 4, 2)
        return GramConfig((edge, edge), 32, 4, 2)
    if precision == "tf32x3":
        # Twice the bytes; and where four warps would do, they spill what is added to.
        warps = 8 if of_gram.tile[0] > 32 else of_gram.num_warps
        return replace(of_gram, depth=of_gram.depth // 2, num_warps=warps)
    return of_gram
