"""Feed-forward blocks of few neurons beside ordinary layers: seconds, memory and share of the floor, in one run.

    python bench/fused_mlp.py [--tokens T ...] [--widths D,H ...] [--threads N] [--rounds N] [--out FILE]

On a CPU; `bench/gpu.py --only mlp` is for GPUs. `FusedMLP` beside `torch.nn.Sequential` of the same width and
`FusedGLU` beside the same layers composed by hand, float32, forward without gradients and a training step (forward and
backward); ours with the scale folded into the weights, as the layers have it, and in the two trainable forms.

With `--threads 1` what counts are processor seconds, which other programs disturb less than elapsed ones. Variants are
timed in turn, in random order in every round; given are medians and quartiles of the rounds, and ratios of medians. The
floor is the operations of the products over the rate that a large product reaches in the same run. Peak memory is that
of one training step beyond x and the weights. With `--widths`, what `--out` holds of other widths stays.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import random
import statistics
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
from mlp_fusion import FusedGLU, FusedMLP

#: d and h; outputs are as wide as inputs.
CPU_WIDTHS = [(384, 384), (768, 192), (768, 768), (2048, 512)]
CPU_TOKENS = [1, 128, 1024, 8192]
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
        for d, h in options.widths or CPU_WIDTHS:
            for tokens in options.tokens or CPU_TOKENS:
                found = {**cpu_shape(tokens, d, h, gated, options, rate), "product operations per second": rate}
                result["shapes"].append(found)
                ratios = {name: found[name]["ratios to layers"] for name in ("forward", "both")}
                rounded = {n: {k: round(v, 3) for k, v in row.items()} for n, row in ratios.items()}
                print(f"{'gated' if gated else 'plain'} d {d} h {h} tokens {tokens}: {rounded}", flush=True)
                print(f"  {found.get('peak bytes of a step', '')}", flush=True)
    return result


def beside(known: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Earlier results with the shapes of another run, in the place of what they have of its widths."""
    if known["machine"] != found["machine"]:
        raise SystemExit(f"{known['machine']} made what is there, and this is {found['machine']}: choose another --out")
    widths = {(shape["d"], shape["h"]) for shape in found["shapes"]}
    kept = [shape for shape in known["shapes"] if (shape["d"], shape["h"]) not in widths]
    return {**known, "shapes": sorted([*kept, *found["shapes"]], key=_order)}


def _order(shape: dict[str, Any]) -> tuple[bool, int, int, int]:
    return shape["gated"], shape["d"], shape["h"], shape["tokens"]


def width(text: str) -> tuple[int, int]:
    """`768,192` as d and h."""
    d, h = map(int, text.split(","))
    return d, h


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", nargs="*", type=int, help="instead of the usual token counts")
    parser.add_argument("--widths", nargs="*", type=width, metavar="D,H", help="instead of the usual ones")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--rounds", type=int, default=60, help="at most, of each comparison")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds for the rounds of a comparison")
    parser.add_argument("--out", type=Path, default=Path("bench/results/fused_mlp-cpu.json"))
    options = parser.parse_args()
    result = run_cpu(options)
    if options.widths and options.out.is_file():
        result = beside(json.loads(options.out.read_text(encoding="utf-8")), result)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
