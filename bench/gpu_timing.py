"""What the parts of bench/gpu.py share: checks that end the run, device timers, and the rates that floors refer to."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch

DEVICE = "cuda"


def require(holds: bool, message: str) -> None:
    """End the run, with nothing timed, if a check fails."""
    if not holds:
        sys.exit(f"not right, so nothing was timed: {message}")


def milliseconds(work: Callable[[], object], repeats: int = 7) -> dict[str, float]:
    """Median, least and largest time between device events, after one run that is not counted.

    All runs are queued before the host waits, so that short ones are not timed with its pauses.
    """
    work()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in events]
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def ceilings() -> dict[str, float]:
    """FLOP/s of a large bfloat16 product on random data, and bytes/s of a large copy, read and written."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product = milliseconds(lambda: a @ b, 20)["median"]
    source = torch.randn(1 << 29, device=DEVICE)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), 20)["median"]
    return {"bf16_flops": 2 * 8192**3 / product * 1e3, "copy_bytes": 2 * source.nbytes / copy * 1e3}
