"""How the parts of bench/gpu.py time device code, and how they say that something is wrong.

Times are between device events, of one call at a time, in turn with the others that it is compared with. Before each
the second-level cache is emptied and the device made to wait, so that the host's launches are over when the clock
starts: short calls are otherwise timed as the host, and small ones out of the cache. What can be is recorded as a CUDA
graph.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

DEVICE, DTYPE = "cuda", torch.bfloat16
#: Bytes that empty any second-level cache, and cycles that the device waits for the host: about a millisecond.
CACHE_BYTES, WAIT = 256 << 20, 2_000_000
#: Seconds of calls before any is timed, until the clock has settled; calls before one is captured.
SETTLING, WARM_UP = 0.05, 3
#: Rounds of a comparison at least and at most, and seconds after which it ends in between.
LEAST_ROUNDS, ROUNDS, SECONDS = 3, 15, 2.0
#: Sizes of the product and the copy that rates are measured by: rows and columns, bytes.
PRODUCT, COPY = 8192, 2 << 30

Step = Callable[[], Any]


class WrongError(Exception):
    """A result is not what it has to be; the message says which, and by how much."""


def require(holds: bool, message: str) -> None:
    """Raise :class:`WrongError` unless it holds."""
    if not holds:
        raise WrongError(message)


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    return {"median": middle, "lower quartile": low, "upper quartile": high, "rounds": len(times)}


def in_turn(steps: Mapping[str, Step], seconds: float = SECONDS) -> dict[str, dict[str, float]]:
    """Milliseconds of each step on the device, one after the other in every round."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    emptied = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=DEVICE)
    for step in steps.values():
        settle(step)
    began = time.perf_counter()
    for number in range(ROUNDS):
        for name, step in steps.items():
            taken[name].append(timed(step, emptied))
        if number + 1 >= LEAST_ROUNDS and time.perf_counter() - began > seconds:
            break
    return {name: summary(times) for name, times in taken.items()}


def settle(step: Step) -> None:
    """Call it until the clock has settled, at least once."""
    began = time.perf_counter()
    while True:
        step()
        torch.cuda.synchronize()
        if time.perf_counter() - began >= SETTLING:
            return


def timed(step: Step, emptied: torch.Tensor) -> float:
    """Milliseconds of one call; `emptied` is what the cache is emptied by."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    emptied.zero_()
    torch.cuda._sleep(WAIT)
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def captured(step: Step) -> Step:
    """`step` as a CUDA graph, after a few calls on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def all_captured(steps: Mapping[str, Step]) -> tuple[dict[str, Step], dict[str, str]]:
    """Graphs of the steps, and in one line why there is none of the others: a peer may not run on this device."""
    graphs: dict[str, Step] = {}
    refused: dict[str, str] = {}
    for name, step in steps.items():
        try:
            graphs[name] = captured(step)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is why this one is not timed
            refused[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
    return graphs, refused


def compared(rows: dict[str, dict[str, float]], base: str, floor: float | None) -> dict[str, Any]:
    """Times with their ratios to those of `base`, where that was timed, and the share of the floor that each reaches.

    Args:
        rows: of :func:`in_turn`.
        floor: milliseconds.
    """
    found: dict[str, Any] = {"ms": rows}
    if base in rows:
        found[f"times {base}"] = {n: row["median"] / rows[base]["median"] for n, row in rows.items() if n != base}
    if floor is not None:
        found["floor ms"] = floor
        found["share of the floor"] = {name: floor / row["median"] for name, row in rows.items()}
    return found


def in_brief(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Medians, for the terminal."""
    return ", ".join(f"{name} {row['median']:.3f}" for name, row in rows.items()) + " ms"


def peak_bytes(step: Step) -> int:
    """Bytes that one call allocates beyond what is there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def ceilings() -> dict[str, float]:
    """FLOP/s of a large bfloat16 product on random data, and bytes/s of a large copy, read and written."""
    a, b = (torch.randn(PRODUCT, PRODUCT, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(COPY // 4, device=DEVICE)
    target = torch.empty_like(source)
    ms = in_turn({"product": lambda: a @ b, "copy": lambda: target.copy_(source)})
    return {
        "bf16_flops": 2 * PRODUCT**3 / ms["product"]["median"] * 1e3,
        "copy_bytes": 2 * source.nbytes / ms["copy"]["median"] * 1e3,
    }
