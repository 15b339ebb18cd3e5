"""Where the time of one call goes, for bench/gpu.py: tables of torch.profiler, by kernel and by operator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import gpu_kmeans
import gpu_mlp
import gpu_timing
import torch
from fused_mlp import training
from gpu_running import Told, Work
from torch.profiler import ProfilerActivity, profile

from fusion_kernels import kmeans

SHAPE, BLOCK, ROWS = "bert", gpu_mlp.BLOCKS[0], 25


def lines(told: Told) -> Iterator[tuple[str, Work]]:
    """k-means by its default mode, and a training step by the epilogue kernels."""
    yield f"k-means, {SHAPE}", functools.partial(profiled, kmeans_call)
    yield f"training step, {BLOCK}", functools.partial(profiled, training_call)


def kmeans_call() -> Callable[[], object]:
    """One batch."""
    _, K, _, problems = gpu_kmeans.SHAPES[SHAPE]
    x = gpu_kmeans.points(SHAPE, problems)
    return lambda: kmeans(x, K, backend="triton")


def training_call() -> Callable[[], object]:
    """One step."""
    problem = BLOCK.problem()
    return training(problem, functools.partial(problem.fused, 1, "epilogue"))


def profiled(prepare: Callable[[], Callable[[], object]]) -> dict[str, Any]:
    """The table of one call, the longest on the device first, after one call that is not counted."""
    call = prepare()
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    averages = found.key_averages()
    by = "device_time_total" if gpu_timing.DEVICE == "cuda" else "cpu_time_total"
    table = averages.table(sort_by=by, row_limit=ROWS, max_name_column_width=60)
    first = max(averages, key=lambda row: row.self_device_time_total)
    launches = sum(row.count for row in averages if row.device_type.name == "CUDA")
    return {
        "table": table.splitlines(),
        "kernels launched": launches,
        "brief": f"{launches} kernels, most: {first.key}",
    }
