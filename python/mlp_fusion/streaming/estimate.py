"""What a streamed run will cost, from shapes and the speed of this machine's products: an estimate."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable

import torch

from mlp_fusion.streaming.engines import held_here
from mlp_fusion.streaming.tasks import TASK_BYTES

#: What a run needs beside its tasks; and of a task, how many times the float32 neurons that it reads.
_BASE_BYTES, _TIMES = 450 * 2**20, 4
#: Share of the speed of a large product in float32 that the whole work comes to; bytes per second of files.
#: Measured in `bench/moe.py`.
_SHARE, _BYTES_PER_SECOND = 0.5, 0.5e9


def operations(ffns: Iterable[tuple[int, int]]) -> int:
    """Floating-point operations of clustering: half a Gram matrix of each FFN.

    Args:
        ffns: neurons, and parameters in all, of each FFN or expert.
    """
    return sum(neurons * parameters for neurons, parameters in ffns)


def seconds(work: int, moved: int) -> float:
    """How long a run takes here, about.

    Args:
        work: operations.
        moved: bytes that are read and written.
    """
    return work / (_SHARE * _speed()) + moved / _BYTES_PER_SECOND


def peak_bytes(largest: int) -> int:
    """The most memory that a run takes here, about.

    Args:
        largest: float32 bytes of the largest FFN or expert.
    """
    return _BASE_BYTES + held_here(largest) * _TIMES * max(TASK_BYTES, largest)


@functools.cache
def _speed() -> float:
    """Operations per second of a product in float32, by all threads."""
    x = torch.ones(512, 2048)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        x @ x.T
        best = min(best, time.perf_counter() - started)
    return 2 * 512 * 512 * 2048 / best
