"""Which backend of a block is fastest on the device at hand: a contest on synthetic tokens and the block's own weights.

Each candidate runs forward and, where hidden tensors are saved, backward. Times are those of a CUDA graph of the step,
after the clock of the device has settled, with the second-level cache emptied before each: short steps are otherwise
timed as the host's launches, and small ones out of the cache. Where a candidate waits for the device, which no graph
records, all are timed as they are called. Candidates take turns. One has to be 3 % faster than what runs without
measurements, and no less exact.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusion_kernels.ffn import FFN
from fusion_kernels.mlp.types import Needs

#: (forward, backward) of a backend, as in `fusion_kernels.mlp.operators.Functions`.
Pair = tuple[Callable[..., Any], Callable[..., Any]]
#: Milliseconds of each of several pieces of work; and whether a CUDA graph may record them.
Clock = Callable[[Mapping[str, Callable[[], object]], bool], dict[str, float]]

#: By how much a kernel has to win.
MARGIN = 0.03
#: An RMS error may be this many times that of torch, beside what rounding the results takes.
RATIO = 2.0
#: Rows whose results are compared with float64.
CHECKED = 128
#: Of a device's clock: milliseconds until it has settled, rounds, bytes that empty any second-level cache.
WARM_UP, ROUNDS, CACHE_BYTES = 200.0, 11, 256 * 2**20


@dataclass(frozen=True)
class Outcome:
    """Of a contest.

    Attributes:
        backend: who won.
        ms: of everyone who was timed.
        refused: who was not, and why in one line.
    """

    backend: str
    ms: dict[str, float]
    refused: dict[str, str]


def contest(
    pairs: Mapping[str, Pair], rows: tuple[Tensor, ...], ffn: FFN, level: int, clock: Clock, waiting: Collection[str]
) -> Outcome:
    """Let candidates, the first of them what runs without measurements, compute one step.

    Args:
        rows: what is given beside the block: `synthetic` tokens, and what an operator takes behind them.
        level: `checkpoint_level`; 2 for the forward alone.
        waiting: backends that wait for the device, which no CUDA graph records. Where one of them is timed, all are
            timed as they are called.
    """
    default, *_ = pairs
    steps = {name: functools.partial(_step, pair, rows, ffn, level) for name, pair in pairs.items()}
    refused: dict[str, str] = {}
    judge: _Judge | None = None
    for name, step in steps.items():
        try:
            found = step()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if name == default:
                raise
            refused[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            continue
        if judge is None:
            judge = _Judge(rows, ffn, level, found)
        elif reason := judge.objection(found):
            refused[name] = reason
    timed = {name: step for name, step in steps.items() if name not in refused}
    times = clock(timed, timed.keys().isdisjoint(waiting))
    best = min(times, key=times.__getitem__)
    won = best if times[best] <= (1 - MARGIN) * times[default] else default
    return Outcome(won, {name: round(ms, 5) for name, ms in times.items()}, refused)


def synthetic(tokens: int, like: Tensor) -> Tensor:
    """(tokens, d) for rows like these, the same every time, from no generator that others use."""
    g = torch.Generator(like.device).manual_seed(tokens)
    return torch.randn(tokens, like.shape[1], generator=g, device=like.device, dtype=torch.float32).to(like.dtype)


def _step(pair: Pair, rows: tuple[Tensor, ...], ffn: FFN, level: int) -> dict[str, Tensor]:
    forward, backward = pair
    y, *kept = forward(*rows, ffn, level)
    if level == 2:
        return {"y": y}
    needs = Needs(True, *(t is not None and t.is_floating_point() for t in ffn.tensors))
    # y is a gradient of its own size as good as another.
    gradients = backward(y, *rows, ffn, tuple(kept), level, needs)
    named = {f"gradient of {name}": t for name, t in gradients._asdict().items() if t is not None}
    return {"y": y, **named}


class _Judge:
    """What the results of candidates are held against: float64 row by row, and what runs without measurements."""

    def __init__(self, rows: tuple[Tensor, ...], ffn: FFN, level: int, default: dict[str, Tensor]) -> None:
        from fusion_kernels.mlp import reference

        x = rows[0]
        self.default, self.at = default, torch.arange(0, len(x), max(1, len(x) // CHECKED), device=x.device)
        self.exact: Tensor | None = None
        if len(rows) == 1:  # of experts, rows belong to blocks that only the device knows
            self.exact = reference.mlp(x[self.at].double(), ffn.map(Tensor.double))

    def objection(self, found: dict[str, Tensor]) -> str | None:
        """In one line what is less exact than it may be, or None."""
        if self.exact is not None:
            unit = torch.finfo(found["y"].dtype).eps * _rms(self.exact)
            own, usual = (_rms(t["y"][self.at].double() - self.exact) for t in (found, self.default))
            if not own <= RATIO * usual + 0.3 * unit:
                return f"y errs by {own:.3g} where torch's operations err by {usual:.3g}"
        for name, t in self.default.items():
            apart, allowed = _rms(found[name].double() - t.double()), 4 * torch.finfo(t.dtype).eps * _rms(t.double())
            if not apart <= allowed:
                return f"{name} is {apart:.3g} from that of torch's operations, of which {allowed:.3g} is allowed"
        return None


def _rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt()) if t.numel() else 0.0


def device_clock(works: Mapping[str, Callable[[], object]], recordable: bool) -> dict[str, float]:
    """Milliseconds of each on the current CUDA device; medians of rounds in turn.

    Args:
        works: each a piece of work.
        recordable: time replays of a graph; else calls, with the host's launches in them.
    """
    calls = {name: _recorded(work) for name, work in works.items()} if recordable else dict(works)
    emptied = torch.empty(CACHE_BYTES, dtype=torch.uint8, device="cuda")
    for call in calls.values():
        _settle(call)
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            emptied.zero_()
            times[name].append(_timed(call))
    return {name: statistics.median(own) for name, own in times.items()}


def _recorded(work: Callable[[], object]) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on using the device.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay


def _settle(call: Callable[[], object]) -> None:
    passed = 0.0
    for _ in range(1000):
        passed += _timed(call)
        if passed >= WARM_UP:
            return


def _timed(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
