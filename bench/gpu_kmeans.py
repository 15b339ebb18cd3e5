"""The k-means of bench/gpu.py: how long it takes, step by step and mode by mode, beside others.

Points are like a network's neurons, all problems of a batch together. Modes are the defaults, Lloyd's iteration, and
Lloyd's iteration from given points for a fixed number of passes, as the peers have it: torch with products in bfloat16
by cuBLAS, and flash-kmeans if it is installed. Inertias are computed in float64 from the labels, so that a faster
result that is worse shows. Floors are operations and bytes that cannot be avoided, over the rates of the device stage.
Whether results are right is what the proofs find out.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import gpu_timing
import torch
from gpu_device import known_rates
from gpu_running import Told, Work
from gpu_timing import compared, in_brief, in_turn
from support import neuron_like
from torch import Tensor

from fusion_kernels import gpu, kmeans, kmeans_assign, native

#: N, K, D and how many problems: the FFNs of MiniLM, of BERT-base, the experts of a layer, one FFN of Llama's size.
SHAPES = {
    "bert": (3072, 768, 1537, 12),
    "minilm": (1536, 384, 769, 6),
    "experts": (768, 384, 6144, 128),
    "llama": (14336, 3584, 12288, 1),
}
LARGE = "llama"
#: N, K, D and how many problems: the experts of a layer of Mixtral's, to half their neurons; and the bytes that they
#: need, in those of their points: these twice while they are drawn, Gram matrices, and copies in parts.
LAYER, LAYER_COPIES = (14336, 7168, 12288, 8), 6
#: Seconds that there have to be left for it: drawn, and timed a few times.
LAYER_NEEDS = 20.0
#: N, K, D of the search for nearest centroids alone.
ASSIGN = (262_144, 1024, 1024)
ITERATIONS = 15
#: Calls whose steps are timed.
REPEATS = 3
#: Seconds after which the CPU is asked no second or third time.
CPU_SECONDS = 4.0
#: What is timed inside a call: place and name in `fusion_kernels.kmeans`, and what it is called here.
STEPS = {
    ("triton_backend", "prepare"): "Gram",
    ("triton_backend", "_Seeding.__call__"): "seeding",
    ("triton_run", "Run.lloyd"): "Lloyd",
    ("triton_run", "Run.hartigan"): "Hartigan",
    ("triton_backend", "_results"): "means and inertia",
    ("triton_backend", "resolved_problems"): "whether float32 is enough",
    ("triton_backend", "settle_problem"): "settling",
}


def lines(told: Told) -> Iterator[tuple[str, Work]]:
    """Steps and modes of each shape, and one problem on the CPU; the largest shape comes last, and may be left out."""
    rates = known_rates(told)
    for name in SHAPES:
        if name == LARGE:
            yield "nearest centroids", functools.partial(nearest, rates)
            yield "bert, one problem: steps", functools.partial(steps, "bert", rates, 1)
        yield f"{name}: steps", functools.partial(steps, name, rates)
        yield f"{name}: modes", functools.partial(modes, name)
        yield f"{name}: on the CPU", functools.partial(on_the_cpu, name)
    yield "mixtral: whole layer", functools.partial(whole_layer, told)


def jobs() -> dict[str, Callable[[], object]]:
    """Calls that launch everything that is timed here, by name: one problem each."""
    found: dict[str, Callable[[], object]] = {f"kmeans {name}": functools.partial(_once, name) for name in SHAPES}
    found["kmeans whole layer"] = lambda: kmeans(_drawn(LAYER, 1), LAYER[1], backend="triton")
    found["kmeans nearest centroids"] = functools.partial(_assigned, 4096)
    return found


def _once(name: str) -> None:
    _, K, _, _ = SHAPES[name]
    x = points(name, 1)
    for call in _modes(x, K, _start(x, K)).values():
        call()


def points(name: str, problems: int) -> Tensor:
    """(B, N, D) float32, drawn on the device."""
    return _drawn(SHAPES[name], problems)


def _drawn(shape: tuple[int, int, int, int], problems: int) -> Tensor:
    N, _, D, _ = shape
    return torch.stack([neuron_like(N, D, seed, device=gpu_timing.DEVICE) for seed in range(problems)])


def _start(x: Tensor, K: int) -> Tensor:
    """(B, K, D), K points of each problem."""
    B, N, D = x.shape
    order = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(seed))[:K] for seed in range(B)])
    return x.gather(1, order.to(x.device)[:, :, None].expand(-1, -1, D))


# --- by step ---------------------------------------------------------------------------------------------------------


class ByStep:
    """Device time of the steps of a call, between events that are recorded around them."""

    def __init__(self) -> None:
        self.events: dict[str, list[tuple[Any, Any]]] = {}
        self.counts: dict[str, list[Tensor]] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Record inside."""
        with contextlib.ExitStack() as patches:
            for (module, place), step in STEPS.items():
                owner: Any = importlib.import_module(f"fusion_kernels.kmeans.{module}")
                *inner, name = place.split(".")
                for part in inner:
                    owner = getattr(owner, part)
                patches.enter_context(mock.patch.object(owner, name, self._watched(step, getattr(owner, name))))
            yield

    def _watched(self, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            counted = step in ("Lloyd", "Hartigan")
            before = args[0].n_iter.clone() if counted else None
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            found = function(*args, **kwargs)
            end.record()
            self.events.setdefault(step, []).append((begin, end))
            if before is not None:
                self.counts.setdefault(step, []).append(args[0].n_iter - before)
            return found

        return run

    def ms(self) -> dict[str, float]:
        """Milliseconds of each step, all its calls together."""
        torch.cuda.synchronize()
        return {step: sum(begin.elapsed_time(end) for begin, end in pairs) for step, pairs in self.events.items()}

    def passes(self) -> dict[str, int]:
        """Of Lloyd's iteration and rounds of moves, the most of any problem."""
        return {step: max(int(count.max()) for count in counts) for step, counts in self.counts.items()}


def steps(name: str, rates: dict[str, float], problems: int | None = None) -> dict[str, Any]:
    """Steps of the default mode: medians of a few calls, how many rounds there were, and what one takes."""
    N, K, D, usual = SHAPES[name]
    B = usual if problems is None else problems
    x = points(name, B)
    kmeans(x, K, backend="triton")
    runs: list[dict[str, float]] = []
    watch = ByStep()
    for _ in range(REPEATS):
        watch = ByStep()
        with watch.watching():
            kmeans(x, K, backend="triton")
        runs.append(watch.ms())
    ms = {step: statistics.median(run[step] for run in runs) for step in runs[0]}
    floors = {
        "Gram": B * 3 * N * N * D / rates["bf16_flops"] * 1e3,
        "one sweep of Gram": B * 4 * N * N / rates["copy_bytes"] * 1e3,
        "seeding": B * K * (2 + int(math.log(K))) * 4 * N / rates["copy_bytes"] * 1e3,
    }
    passes = watch.passes()
    each = {step: 1e3 * ms[step] / max(1, count) for step, count in passes.items()}
    return {
        "N": N, "K": K, "D": D, "problems": B, "ms": ms, "passes": passes, "us per pass": each,
        "floors ms": floors, "share of the floor": {step: floors[step] / ms[step] for step in ("Gram", "seeding")},
        "brief": ", ".join(f"{step} {value:.2f}" for step, value in ms.items())
        + f" ms; {passes.get('Hartigan', 0)} rounds of {each.get('Hartigan', 0.0):.1f} us",
    }  # fmt: skip


# --- by mode ---------------------------------------------------------------------------------------------------------


def _modes(x: Tensor, K: int, start: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Labels (B, N) by ours in every mode."""
    lloyd: dict[str, Any] = {"algorithm": "lloyd", "max_iter": ITERATIONS}
    return {
        "default": lambda: kmeans(x, K, backend="triton").labels,
        "lloyd": lambda: kmeans(x, K, backend="triton", **lloyd).labels,
        "given": lambda: kmeans(x, K, backend="triton", init=start, **lloyd).labels,
        "fast, default": lambda: kmeans(x, K, backend="triton-fast").labels,
    }


def _without_graphs(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same with the host launching every kernel of every round."""

    def run() -> Tensor:
        with mock.patch("fusion_kernels.kmeans.triton_run.recorded", lambda work: work):
            return call()

    return run


def torch_lloyd(x: Tensor, start: Tensor, iterations: int) -> Tensor:
    """Lloyd's iteration as one writes it with torch: bfloat16 products, float32 sums; labels (B, N)."""
    B, N, D = x.shape
    K = start.shape[1]
    low, centroids = x.bfloat16(), start.clone()
    labels = torch.empty(B, N, dtype=torch.int64, device=x.device)
    offset = torch.arange(B, device=x.device)[:, None] * K
    for _ in range(iterations):
        norms = centroids.square().sum(2)
        distances = torch.baddbmm(norms[:, None, :].bfloat16(), low, centroids.bfloat16().mT, alpha=-2)
        labels = distances.argmin(2)
        flat = (labels + offset).flatten()
        sums = torch.zeros(B * K, D, device=x.device).index_add_(0, flat, x.flatten(0, 1))
        counts = torch.bincount(flat, minlength=B * K)[:, None]
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids.flatten(0, 1)).view(B, K, D)
    return labels


def inertia(x: Tensor, labels: Tensor, K: int) -> float:
    """Mean over problems of the inertia of the labels over that of one cluster, in float64."""
    shares = []
    for rows, at in zip(x, labels.long(), strict=True):
        exact = rows.double()
        sums = torch.zeros(K, rows.shape[1], dtype=torch.float64, device=x.device).index_add_(0, at, exact)
        means = sums / torch.bincount(at, minlength=K).clamp(min=1)[:, None]
        shares.append(float((exact - means[at]).square().sum() / (exact - exact.mean(0)).square().sum()))
    return statistics.mean(shares)


def modes(name: str) -> dict[str, Any]:
    """Times of whole calls with the inertias that they end at, ours and the peers'."""
    N, K, D, problems = SHAPES[name]
    x = points(name, problems)
    start = _start(x, K)
    calls = _modes(x, K, start)
    calls["default, launched one by one"] = _without_graphs(calls["default"])
    peer = f"torch bf16, given, {ITERATIONS} passes"
    calls[peer] = lambda: torch_lloyd(x, start, ITERATIONS)
    if importlib.util.find_spec("flash_kmeans") is not None:
        from flash_kmeans import batch_kmeans_Euclid

        low = x.bfloat16()
        calls["flash-kmeans bf16"] = lambda: batch_kmeans_Euclid(low, K, max_iters=ITERATIONS)[0]
    rows = in_turn(calls, seconds=5.0)
    found = {mode: inertia(x, call(), K) for mode, call in calls.items()}
    return {
        "N": N, "K": K, "D": D, "problems": problems, **compared(rows, peer, None), "inertia": found,
        "brief": f"{in_brief(rows)}; inertia " + ", ".join(f"{value:.4f}" for value in found.values()),
    }  # fmt: skip


def on_the_cpu(name: str) -> dict[str, Any]:
    """Seconds of one problem by the compiled kernels of the CPU, beside the same on the device."""
    if native.UNAVAILABLE is not None:
        return {"skipped": native.UNAVAILABLE}
    _, K, _, _ = SHAPES[name]
    x = points(name, 1)
    there = x.cpu()
    taken: list[float] = []
    while len(taken) < REPEATS and sum(taken) < 1e3 * CPU_SECONDS:
        began = time.perf_counter()
        found = kmeans(there, K)
        taken.append(1e3 * (time.perf_counter() - began))
    device = in_turn({"device": lambda: kmeans(x, K, backend="triton")})["device"]
    ours = kmeans(x, K, backend="triton")
    ratio = float(ours.inertia[0].cpu() / found.inertia[0])
    cpu = statistics.median(taken)
    return {
        "threads": torch.get_num_threads(), "cpu ms": cpu, "device ms": device, "inertia, device over CPU": ratio,
        "times faster": cpu / device["median"],
        "brief": f"CPU {cpu:.1f} ms, device {device['median']:.1f} ms, inertia {ratio:.5f} of the CPU's",
    }  # fmt: skip


def whole_layer(told: Told) -> dict[str, Any]:
    """All experts of one layer side by side, where memory and time are enough for them."""
    N, K, D, problems = LAYER
    needed, free = LAYER_COPIES * 4 * problems * N * D, gpu.free_memory(torch.device(gpu_timing.DEVICE))
    if free < needed:
        return {"skipped": f"needs {needed / 2**30:.0f} GiB of the device, of which {free / 2**30:.0f} are free"}
    if told.left() < LAYER_NEEDS:
        return {"skipped": f"not reached: {max(0.0, told.left()):.0f} s are left of {LAYER_NEEDS:.0f}"}
    x = _drawn(LAYER, problems)
    rows = in_turn({"default": lambda: kmeans(x, K, backend="triton")}, seconds=5.0)
    return {"N": N, "K": K, "D": D, "problems": problems, "ms": rows, "brief": in_brief(rows)}


# --- nearest centroids -----------------------------------------------------------------------------------------------


def _assigned(rows: int) -> Tensor:
    _, K, D = ASSIGN
    g = torch.Generator(gpu_timing.DEVICE).manual_seed(0)
    x, centroids = (torch.randn(n, D, generator=g, device=gpu_timing.DEVICE) for n in (rows, K))
    return kmeans_assign(x, centroids, backend="triton")


def nearest(rates: dict[str, float]) -> dict[str, Any]:
    """Nearest centroids of many points, beside a bfloat16 product that is stored and searched by torch."""
    N, K, D = ASSIGN
    x = torch.randn(N, D, device=gpu_timing.DEVICE)
    centroids = torch.randn(K, D, device=gpu_timing.DEVICE)
    low, norms = x.bfloat16(), centroids.square().sum(1)

    def stored() -> Tensor:
        return torch.addmm(norms.bfloat16(), low, centroids.bfloat16().mT, alpha=-2).argmin(1)

    ours = functools.partial(kmeans_assign, x, centroids, backend="triton")
    rows = in_turn({"triton": ours, "torch bf16": stored})
    floor = 6 * N * K * D / rates["bf16_flops"] * 1e3
    return {"N": N, "K": K, "D": D, **compared(rows, "torch bf16", floor), "brief": in_brief(rows)}
