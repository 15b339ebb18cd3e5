"""Nsight Compute for bench/gpu.py: what six kernels keep busy, and what they wait for. Clocks are left alone."""

from __future__ import annotations

import csv
import functools
import io
import re
import time
from collections.abc import Iterator
from typing import Any

from gpu_running import Told, Work
from gpu_watched import last, tool, watch

#: Kernels by the call that launches them, and how many of their launches are looked at.
KERNELS = {
    "kmeans": (("_gram_kernel", "_plus_plus_kernel", "_best_move_kernel", "_select_moves_kernel"), 8),
    "mlp": (("_linear_act_kernel", "_linear_glu_backward_kernel"), 2),
}
SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "WarpStateStats",
    "LaunchStats",
    "Occupancy",
)
METRICS = "regex:sm__inst_executed_pipe_tensor"
#: Of what the sections have: what is kept.
KEPT = re.compile(
    r"sm__inst_executed_pipe_tensor|dram__throughput|lts__throughput|sm__throughput|gpu__time_duration"
    r"|issue_stalled|dram__bytes|warps_active|registers_per_thread|occupancy_limit|shared_mem_per_block"
)
#: Seconds: before the end of a line, of a line, and that another attempt is worth.
MARGIN, LINE_SECONDS, LEAST_SECONDS = 2.0, 28.0, 6.0


def lines(told: Told) -> Iterator[tuple[str, Work]]:
    """One line for each call."""
    for call in KERNELS:
        yield call, functools.partial(profiled, call, told)


def profiled(call: str, told: Told) -> dict[str, Any]:
    """Metrics of the call's kernels, launch by launch; without those of the tensor pipe where ncu refuses them."""
    ncu = tool("ncu")
    if ncu is None:
        return {"skipped": "ncu is neither on the PATH nor beside nvcc"}
    names, count = KERNELS[call]
    usual = [
        ncu, "--clock-control", "none", "--kernel-name", f"regex:^({'|'.join(names)})$", "--launch-count", str(count),
        "--csv", "--page", "raw", *(word for section in SECTIONS for word in ("--section", section)),
    ]  # fmt: skip
    refused: dict[str, str] = {}
    ends = time.monotonic() + min(LINE_SECONDS, told.left()) - MARGIN
    for how, command in (("with metrics", [*usual, "--metrics", METRICS]), ("by sections", usual)):
        if refused and ends - time.monotonic() < LEAST_SECONDS:
            break
        status, said = watch(command, call, ends - time.monotonic())
        rows = launches(said)
        if rows:
            seen = sorted({row["kernel"] for row in rows})
            missing = sorted(set(names) - set(seen))
            brief = f"{len(rows)} launches of {', '.join(seen)}"
            found: dict[str, Any] = {"launches": rows, "how": how, "refused": refused, "brief": brief}
            return {**found, "failed": f"not seen: {', '.join(missing)}"} if missing else found
        refused[how] = "it did not end in time" if status is None else f"status {status}: {last(said)}"
    return {"failed": "; ".join(f"{how}: {why}" for how, why in refused.items())}


def launches(said: str) -> list[dict[str, Any]]:
    """The kept metrics of every launch, with their units, out of ncu's raw page and whatever else was said."""
    lines_ = said.splitlines()
    begins = next((n for n, line in enumerate(lines_) if line.startswith('"ID"')), None)
    if begins is None:
        return []
    table = list(csv.DictReader(io.StringIO("\n".join(lines_[begins:]))))
    if len(table) < 2:
        return []
    units, *rows = table
    return [
        {
            "kernel": row.get("Kernel Name", ""),
            **{n: f"{row[n]} {units.get(n) or ''}".strip() for n in row if n and KEPT.search(n) and row[n]},
        }
        for row in rows
    ]
