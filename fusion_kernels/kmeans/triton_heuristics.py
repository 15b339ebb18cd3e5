"""Shapes to launch configurations for the Triton kernels of k-means: pure functions, nothing is timed at run time.

What a problem's result depends on is chosen from that problem's shape and the GPU alone, never from the number of
problems beside it: a problem has the same result, to the bit, alone as in a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fusion_kernels.gpu import LARGE_SHARED_MEMORY

#: Entries of a row of the split points are padded to a multiple of this, so that odd D keeps wide, aligned loads.
DEPTH_MULTIPLE = 64
#: Rows of Gram and of products begin at a multiple of this many entries (128 bytes of float32).
STRIDE_MULTIPLE = 32
#: Programs that keep a large GPU busy: work lists of a batch are spread over about this many.
_PROGRAMS = 4096


@dataclass(frozen=True)
class GramConfig:
    """Launch configuration of `_gram_kernel`: tile (BM, BN), BD columns per step and partial sum."""

    tile: tuple[int, int]
    depth: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class SweepConfig:
    """Block sizes of the kernels that walk over points and clusters.

    Attributes:
        points: points per program of a nearest-centroid or best-move search.
        clusters: clusters per step of it.
        columns: columns of Gram per program of a centroid's sum.
        members: members whose rows are loaded at a time.
        scan: points per step of a kernel that walks over all points of a problem.
    """

    points: int
    clusters: int
    columns: int
    members: int
    scan: int


def gram_config(rows: int, split: bool, shared_memory: int, major: int = 0) -> GramConfig:
    """For problems of `rows` points; `split` for three products per tile, else one.

    Args:
        major: of the GPU's compute capability. On 10.x a tile's sums pass through shared memory: one stage fewer fits.
    """
    if rows <= 64:
        return GramConfig((32, 32), 32, 4, 2)
    if shared_memory >= LARGE_SHARED_MEMORY:
        return GramConfig((128, 128), 64, 8, 2 if split and major == 10 else 3)
    return GramConfig((64, 64), 64, 4, 3) if split else GramConfig((128, 128), 32, 8, 4)


def nearest_config(rows: int, shared_memory: int, major: int = 0) -> GramConfig:
    """For the nearest centroids of `rows` points per problem.

    Smaller tiles than the Gram matrix has: the search for the least distance needs registers of its own.
    """
    config = gram_config(rows, True, shared_memory, major)
    depth = config.depth if shared_memory >= LARGE_SHARED_MEMORY else 32
    return replace(config, tile=(config.tile[0], min(64, config.tile[1])), depth=depth)


def sweep_config(N: int, K: int, wide: bool) -> SweepConfig:
    """For problems of N points and K clusters; `wide` for float64."""
    members = min(8, max(2, _power_of_two(-(-N // K))))
    if N <= 64:
        return SweepConfig(16, 16, 64, members, 64)
    if wide:
        return SweepConfig(64, 16, 256, members, 512)
    return SweepConfig(32, 128, 512, members, 1024)


def seeding_block(N: int, trials: int, wide: bool) -> tuple[int, int, int]:
    """Points per step of k-means++'s scans and of its trials, and warps; `wide` for float64.

    One program has a problem, and every step waits for the one before it: as few as registers allow.
    """
    most = 2048 if wide else 4096
    scan = min(most, max(16, _power_of_two(N)))
    block = max(16, min(scan, most // 2, 4 * most // _power_of_two(trials)))
    return scan, block, 16 if scan > 1024 else 4 if wide else 8


def list_programs(B: int, K: int, tiles: int = 1) -> int:
    """Programs per problem that share a list of at most K clusters, each for `tiles` tiles; affects no result."""
    return min(K, max(1, _PROGRAMS // max(1, B * tiles)))


def problem_bytes(N: int, K: int, D: int, element: int, split: bool) -> int:
    """Workspace of one problem: the split points, Gram, the products of centroids and points, and vectors."""
    depth, stride = round_up(D, DEPTH_MULTIPLE), round_up(N, STRIDE_MULTIPLE)
    points = N * D * 8 if element == 8 else (N + K) * depth * (4 if split else 2)
    return points + (N + K) * stride * element + 128 * (N + K)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def _power_of_two(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()
