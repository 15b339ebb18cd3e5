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


def tile_config(rows: int, precision: str, dtype: torch.dtype, shared_memory: int, major: int) -> GramConfig:
    """For a kernel of at most `rows` rows and columns.

    Two accumulators and a partial sum of 128 x 128 fill the registers of 8 warps, as operands in two planes fill shared
    memory: tiles for tensor cores are those of the exact Gram matrices of k-means. Without them it is multiply-adds
    that take time, and a few smaller tiles on a multiprocessor hide how long loads take.

    Args:
        major: of the GPU's compute capability. On 10.x tensor cores accumulate in a memory of their own, and to add two
            such tiles up takes more registers than there are: tiles are those for little shared memory.
    """
    of_gram = gram_config(rows, True, 0 if major == 10 else shared_memory)
    if precision == "highest":
        edge = min(64, of_gram.tile[0])
        return GramConfig((edge, edge), 16 if dtype == torch.float64 else 32, 4, 2)
    # TF32 takes twice the bytes.
    return replace(of_gram, depth=of_gram.depth // 2) if precision == "tf32x3" else of_gram
