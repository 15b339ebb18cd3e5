"""Feed-forward blocks of few neurons beside ordinary layers: seconds, memory and share of the floor, in one run.

    python bench/fused_mlp.py [--device cpu|cuda] [--tokens T ...] [--threads N] [--rounds N] [--out FILE]

On a CPU: `FusedMLP` beside `torch.nn.Sequential` of the same width and `FusedGLU` beside the same layers composed by
hand, float32, forward without gradients and a training step (forward and backward); ours with the scale folded into the
weights, as the layers have it, and in the two trainable forms. On a GPU: every backend beside
eager layers, `torch.compile` (default and max-autotune), Liger's gated kernels and flash-attn's FusedMLP where they are
installed, bfloat16, forward, backward and both, as calls and captured in a CUDA graph. All run on the same weights with
the scale folded in, except ours, which fold it in every call.

On a CPU with `--threads 1` what counts are processor seconds, which other programs disturb less than elapsed ones.
Variants are timed in turn, in random order in every round; given are medians and quartiles of the rounds, and ratios of
medians. The floor is the operations of the products over the rate that a large product reaches in the same run, and on
a GPU at least the bytes that an epilogue-fused path moves over the rate of a large copy. Peak memory is that of one
training step beyond x and the weights.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import peak_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from fusion_kernels import backends, fused_glu_mlp, fused_mlp
from fusion_kernels.mlp.heuristics import Shape, path
from fusion_kernels.mlp.operators import MLP
from mlp_fusion import FusedGLU, FusedMLP

#: d and h; outputs are as wide as inputs.
CPU_WIDTHS = [(384, 384), (768, 192), (768, 768)]
CPU_TOKENS = [1, 128, 1024, 8192]
GPU_WIDTHS = [(768, 192), (768, 384), (768, 768), (1024, 256), (2048, 512), (4096, 1024), (4096, 3584)]
GPU_TOKENS = [1024, 8192, 65536]
#: Seconds that one timing of calls takes at least, and rounds of a comparison, whatever they take.
LEAST_SECONDS = 2e-3
LEAST_ROUNDS = 5

Step = Callable[[], Any]


@dataclass
class Problem:
    """x (T, d), dy (T, d) and the weights of a block with its scale folded in."""

    x: Tensor
    dy: Tensor
    w_in: Tensor
    b_in: Tensor
    w_out: Tensor
    b_out: Tensor
    w_gate: Tensor | None

    @staticmethod
    def draw(tokens: int, d: int, h: int, gated: bool, device: str, dtype: torch.dtype) -> Problem:
        """Random leaves that require gradients."""
        torch.manual_seed(0)

        def leaf(*shape: int, by: float = 1.0) -> Tensor:
            return (torch.randn(*shape, device=device) * by).to(dtype).requires_grad_()

        return Problem(
            x=leaf(tokens, d),
            dy=leaf(tokens, d).detach(),
            w_in=leaf(h, d, by=d**-0.5),
            b_in=leaf(h, by=0.1),
            w_out=leaf(d, h, by=h**-0.5),
            b_out=leaf(d, by=0.1),
            w_gate=leaf(h, d, by=d**-0.5) if gated else None,
        )

    def leaves(self) -> list[Tensor]:
        """What has a gradient."""
        given = (self.x, self.w_in, self.b_in, self.w_out, self.b_out, self.w_gate)
        return [t for t in given if t is not None]

    def fused(self, level: int = 1, backend: str = "auto", scale: Tensor | None = None) -> Tensor:
        """Ours."""
        if self.w_gate is None:
            return fused_mlp(
                self.x, self.w_in, self.b_in, self.w_out, self.b_out, scale, "gelu", level, backend=backend
            )
        return fused_glu_mlp(
            self.x, self.w_gate, self.w_in, self.w_out, None, self.b_in, self.b_out, scale, "silu", level,
            backend=backend,
        )  # fmt: skip

    def eager(self) -> Tensor:
        """Ordinary layers, composed by hand."""
        z = F.linear(self.x, self.w_in, self.b_in)
        a = F.gelu(z) if self.w_gate is None else F.silu(F.linear(self.x, self.w_gate)) * z
        return F.linear(a, self.w_out, self.b_out)


def forward_only(run: Callable[[], Tensor]) -> Step:
    """The forward without gradients."""

    def step() -> None:
        with torch.no_grad():
            run()

    return step


def training(problem: Problem, run: Callable[[], Tensor]) -> Step:
    """Forward and backward, gradients returned rather than accumulated."""

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(), problem.leaves(), problem.dy)

    return step


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return {"median": middle, "lower quartile": low, "upper quartile": high, "rounds": len(seconds)}


def in_turn(steps: dict[str, Step], rounds: int, budget: float) -> dict[str, dict[str, float]]:
    """Seconds of each step on the CPU, one after the other in every round, in random order.

    The one that runs after itself finds its weights in the cache, which would favour the first and last of a list.
    """
    order, shuffled = list(steps), random.Random(0)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    calls: dict[str, int] = {}
    for name, step in steps.items():
        step()
        started = clock()
        step()
        calls[name] = max(1, int(LEAST_SECONDS / max(clock() - started, 1e-6)))
    taken: dict[str, list[float]] = {name: [] for name in steps}
    began = time.perf_counter()
    for number in range(rounds):
        shuffled.shuffle(order)
        for name in order:
            started = clock()
            for _ in range(calls[name]):
                steps[name]()
            taken[name].append((clock() - started) / calls[name])
        if time.perf_counter() - began > budget and number + 1 >= LEAST_ROUNDS:
            break
    return {name: summary(seconds) for name, seconds in taken.items()}


def floor_flops(tokens: int, d: int, h: int, gated: bool) -> dict[str, int]:
    """Operations of the products, two for a multiply-add."""
    forward = (6 if gated else 4) * tokens * d * h
    return {"forward": forward, "backward": 2 * forward, "both": 3 * forward}


class GatedLayers(nn.Module):
    """A gated block of ordinary layers."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def cpu_modules(d: int, h: int, gated: bool) -> dict[str, nn.Module]:
    """Ordinary layers, and fused modules of the same width and weights, by form and level."""
    torch.manual_seed(0)
    scale = torch.randint(1, 9, (h,))
    forms = {
        "ours": {},
        "ours, level 2": {"checkpoint_level": 2},
        "ours, scaled": {"scale": scale, "parameterization": "scaled"},
        "ours, split": {"scale": scale, "parameterization": "split"},
    }
    if gated:
        parts = [nn.Linear(d, h, bias=False), nn.Linear(d, h, bias=False), nn.Linear(h, d, bias=False)]
        return {
            "layers": GatedLayers(*parts),
            **{name: FusedGLU.from_mlp(*parts, **form) for name, form in forms.items()},  # type: ignore[arg-type]
        }
    parts = [nn.Linear(d, h), nn.Linear(h, d)]
    return {
        "layers": nn.Sequential(parts[0], nn.GELU(), parts[1]),
        **{name: FusedMLP.from_mlp(*parts, **form) for name, form in forms.items()},  # type: ignore[arg-type]
    }


def cpu_training(module: nn.Module, x: Tensor, dy: Tensor) -> Step:
    """Forward and backward to x and all parameters, gradients returned rather than accumulated."""
    leaves = [x, *module.parameters()]
    return lambda: torch.autograd.grad(module(x), leaves, dy)


def cpu_shape(tokens: int, d: int, h: int, gated: bool, options: argparse.Namespace, rate: float) -> dict[str, Any]:
    """One shape on the CPU: seconds of all modules, their ratios, share of the floor, peak memory."""
    modules = cpu_modules(d, h, gated)
    x, dy = torch.randn(tokens, d, requires_grad=True), torch.randn(tokens, d)
    found: dict[str, Any] = {"tokens": tokens, "d": d, "h": h, "gated": gated}
    steps = {
        "forward": {
            name: forward_only(functools.partial(module, x))
            for name, module in modules.items()
            if name != "ours, level 2"
        },
        "both": {name: cpu_training(module, x, dy) for name, module in modules.items()},
    }
    flops = floor_flops(tokens, d, h, gated)
    for name, variants in steps.items():
        rows = in_turn(variants, options.rounds, options.budget)
        floor = flops[name] / rate
        base = rows["layers"]["median"]
        found[name] = {"floor": floor, **rows}
        found[name]["ratios to layers"] = {k: row["median"] / base for k, row in rows.items() if k != "layers"}
        found[name]["share of the floor"] = floor / rows["ours"]["median"]
    if tokens >= 1024:
        found["peak bytes of a step"] = {name: peak_bytes(step) for name, step in steps["both"].items()}
    return found


def cpu_product_rate() -> float:
    """Operations per second of a large float32 product."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    seconds = in_turn({"product": lambda: a @ b}, 15, 10.0)["product"]["median"]
    return 2 * 2048.0**3 / seconds


def run_cpu(options: argparse.Namespace) -> dict[str, Any]:
    """All shapes on the CPU."""
    torch.set_num_threads(options.threads)
    rate = cpu_product_rate()
    result: dict[str, Any] = {
        "machine": {"processor": platform.machine(), "threads": options.threads},
        "seconds": "of the processor" if options.threads == 1 else "elapsed",
        "load average": os.getloadavg(),
        "versions": {"torch": torch.__version__},
        "backends": {name: row for name, row in backends().items() if name.startswith("mlp")},
        "product operations per second": rate,
        "shapes": [],
    }
    for gated in (False, True):
        for d, h in CPU_WIDTHS:
            for tokens in options.tokens or CPU_TOKENS:
                found = cpu_shape(tokens, d, h, gated, options, rate)
                result["shapes"].append(found)
                ratios = {name: found[name]["ratios to layers"] for name in ("forward", "both")}
                rounded = {n: {k: round(v, 3) for k, v in row.items()} for n, row in ratios.items()}
                print(f"{'gated' if gated else 'plain'} d {d} h {h} tokens {tokens}: {rounded}", flush=True)
                print(f"  {found.get('peak bytes of a step', '')}", flush=True)
    return result


# --- on a GPU: written for CUDA, not run on one yet ------------------------------------------------------------------


def gpu_variants(problem: Problem) -> dict[str, Callable[[], Tensor]]:
    """Ours by backend and level, and the peers that are installed."""
    variants: dict[str, Callable[[], Tensor]] = {"eager": problem.eager}
    for mode in ("default", "max-autotune-no-cudagraphs"):
        variants[f"compile {mode}"] = torch.compile(problem.eager, mode=mode, fullgraph=True)
    for name in ("torch", "cublas", "epilogue"):
        for level in (0, 1, 2):
            variants[f"{name}, level {level}"] = functools.partial(problem.fused, level, name)
    variants["resident, level 2"] = functools.partial(problem.fused, 2, "resident")
    variants["ours"] = problem.fused
    if problem.w_gate is not None:
        liger = optional("liger_kernel.ops.swiglu", "LigerSiLUMulFunction")
        if liger is not None:
            variants["liger"] = lambda: F.linear(
                liger.apply(F.linear(problem.x, problem.w_gate), F.linear(problem.x, problem.w_in, problem.b_in)),
                problem.w_out, problem.b_out,
            )  # fmt: skip
    else:
        flash = optional("flash_attn.ops.fused_dense", "fused_mlp_func")
        if flash is not None:
            variants["flash-attn (tanh)"] = lambda: flash(
                problem.x, problem.w_in, problem.w_out, problem.b_in, problem.b_out, activation="gelu_approx",
                save_pre_act=True, checkpoint_lvl=1, heuristic=0,
            )  # fmt: skip
    return variants


def optional(module: str, name: str) -> Any:
    """`name` of a package that may not be installed."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        return None


def captured(step: Step) -> Step:
    """`step` as a CUDA graph, after a few calls on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def gpu_in_turn(steps: dict[str, Step], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each step between device events, in turn, several calls at a time so that the queue stays full."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(3):
            step()
    for _ in range(rounds):
        for name, step in steps.items():
            torch.cuda._sleep(2_000_000)  # the host runs ahead while the device waits
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(5):
                step()
            end.record()
            end.synchronize()
            taken[name].append(begin.elapsed_time(end) / 5e3)
    return {name: summary(seconds) for name, seconds in taken.items()}


def gpu_peak(step: Step) -> int:
    """Bytes that one call allocates beyond what is there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def gpu_rates() -> tuple[float, float]:
    """Operations per second of a large bfloat16 product, and bytes per second of a large copy."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    big = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    seconds = gpu_in_turn({"product": lambda: a @ a, "copy": big.clone}, 20)
    return 2 * 8192.0**3 / seconds["product"]["median"], 2.0 * big.numel() / seconds["copy"]["median"]


def gpu_floors(tokens: int, d: int, h: int, gated: bool, rates: tuple[float, float]) -> dict[str, float]:
    """Seconds below which no epilogue-fused path can be: of each product, the longer of its arithmetic and memory."""
    flops, bandwidth = rates
    inputs = 2 if gated else 1

    def product(rows: int, inner: int, columns: int, elements: int) -> float:
        return max(2 * rows * inner * columns / flops, 2 * elements / bandwidth)

    wide, narrow, weight = tokens * d, tokens * h, d * h
    first = product(tokens, d, inputs * h, wide + inputs * weight + (inputs + 1) * narrow)
    forward = first + product(tokens, h, d, narrow + weight + wide)
    da = product(tokens, d, h, wide + weight + (2 * inputs + 1) * narrow)
    dx = product(tokens, inputs * h, d, inputs * (narrow + weight) + wide)
    weights = product(d, tokens, h, wide + narrow + weight) + product(inputs * h, tokens, d, wide + inputs * narrow)
    return {"forward": forward, "backward": da + dx + weights, "both": forward + da + dx + weights}


def gpu_shape(tokens: int, d: int, h: int, gated: bool, rounds: int, rates: tuple[float, float]) -> dict[str, Any]:
    """One shape on the GPU; a variant that cannot run there is given with its reason."""
    problem = Problem.draw(tokens, d, h, gated, "cuda", torch.bfloat16)
    found: dict[str, Any] = {"tokens": tokens, "d": d, "h": h, "gated": gated, "not run": {}}
    shape, activation = Shape(tokens, d, h, d, gated, 1), "silu" if gated else "gelu"
    known = MLP.choice.known_rows(torch.device("cuda"), torch.bfloat16, shape, activation, "torch")
    found["chosen"] = path(known, tokens, "torch")
    found["floor"] = floors = gpu_floors(tokens, d, h, gated, rates)
    steps: dict[str, dict[str, Step]] = {"forward": {}, "backward": {}, "both": {}}
    for name, run in gpu_variants(problem).items():
        try:
            forward_only(run)()
            y = run()
            torch.autograd.grad(y, problem.leaves(), problem.dy, retain_graph=True)
        except (ValueError, RuntimeError) as error:
            found["not run"][name] = str(error).splitlines()[0]
            continue
        steps["forward"][name] = forward_only(run)
        steps["backward"][name] = functools.partial(
            torch.autograd.grad, y, problem.leaves(), problem.dy, retain_graph=True
        )
        steps["both"][name] = training(problem, run)
    for direction, variants in steps.items():
        rows: dict[str, Any] = {"calls": gpu_in_turn(variants, rounds)}
        if direction != "backward":
            rows["captured"] = gpu_in_turn({name: captured(step) for name, step in variants.items()}, rounds)
        for table in list(rows.values()):
            for row in table.values():
                row["share of the floor"] = floors[direction] / row["median"]
        found[direction] = rows
    found["peak bytes of a step"] = {name: gpu_peak(step) for name, step in steps["both"].items()}
    return found


def run_gpu(options: argparse.Namespace) -> dict[str, Any]:
    """All shapes on the GPU."""
    rates = gpu_rates()
    result: dict[str, Any] = {
        "machine": {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda},
        "versions": {"torch": torch.__version__},
        "backends": {name: row for name, row in backends().items() if name.startswith("mlp")},
        "rates": {"product operations per second": rates[0], "copy bytes per second": rates[1]},
        "shapes": [],
    }
    for gated in (False, True):
        for d, h in GPU_WIDTHS:
            for tokens in options.tokens or GPU_TOKENS:
                torch._dynamo.reset()
                found = gpu_shape(tokens, d, h, gated, options.rounds, rates)
                result["shapes"].append(found)
                both = {name: round(row["median"] * 1e6, 1) for name, row in found["both"]["calls"].items()}
                print(f"{'gated' if gated else 'plain'} d {d} h {h} tokens {tokens}, us: {both}", flush=True)
    return result


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tokens", nargs="*", type=int, help="instead of the token counts of the device")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--rounds", type=int, default=60, help="at most, of each comparison")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds for the rounds of a comparison on a CPU")
    parser.add_argument("--out", type=Path, help="bench/results/fused_mlp-DEVICE.json if not given")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch finds no CUDA device")
    result = run_cpu(options) if options.device == "cpu" else run_gpu(options)
    out = options.out or Path(f"bench/results/fused_mlp-{options.device}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
