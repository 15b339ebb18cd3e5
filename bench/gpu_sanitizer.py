"""compute-sanitizer for bench/gpu.py: accesses beyond what is allocated, and races in shared memory, in small cases.

Processes of all operators run side by side. torch's own allocator would hide an access beyond a tensor, and is off.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gpu_running import Told, Work
from gpu_watched import last, tool, watch

from fusion_kernels import gpu
from fusion_kernels.ntk import cuda_backend, triton_backend

#: What the sanitizer ends with where it has found something.
FOUND = 86
#: Seconds before the end of a line's time, in which what was said is still read.
MARGIN, LINE_SECONDS = 2.0, 25.0


def lines(told: Told) -> Iterator[tuple[str, Work]]:
    """One line for each of its tools."""
    for name in ("memcheck", "racecheck"):
        yield name, functools.partial(checked, name, told)


def calls() -> list[str]:
    """What can run here."""
    found = ["small-kmeans", "small-mlp", "small-experts", "small-sparse", "small-hadamard"]
    if gpu.why_not(None, frozenset({"resident"})) is None:
        found.append("small-resident")
    if triton_backend.why_not() is None:
        found += ["small-ntk", "small-ntk-sums"]
    if cuda_backend.why_not() is None:
        found.append("small-ntk-cuda")
    return found


def checked(name: str, told: Told) -> dict[str, Any]:
    """What one tool finds in each operator."""
    sanitizer = tool("compute-sanitizer")
    if sanitizer is None:
        return {"skipped": "compute-sanitizer is neither on the PATH nor beside nvcc"}
    command = [sanitizer, "--tool", name, "--error-exitcode", str(FOUND)]
    seconds = min(LINE_SECONDS, told.left()) - MARGIN
    off = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    names = calls()
    with ThreadPoolExecutor(len(names)) as pool:
        ended = list(pool.map(lambda call: watch(command, call, seconds, off), names))
    found = {call: judged(*outcome) for call, outcome in zip(names, ended, strict=True)}
    bad = {call: result["outcome"] for call, result in found.items() if result["outcome"] not in ("clean", "too slow")}
    brief = ", ".join(f"{call} {result['outcome']}" for call, result in found.items())
    result: dict[str, Any] = {"calls": found, "brief": brief}
    return {**result, "failed": f"{name}: {bad}"} if bad else result


def judged(status: int | None, said: str) -> dict[str, Any]:
    """Clean, how many errors, too slow, or what hindered it."""
    if status is None:
        return {"outcome": "too slow", "said": last(said)}
    counted = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+)", said)
    if status == 0 and counted:
        return {"outcome": "clean"}
    if status == FOUND and counted:
        return {"outcome": f"{counted[-1]} errors", "said": said[:6000].splitlines()}
    return {"outcome": f"status {status}", "said": last(said)}
