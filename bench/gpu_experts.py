"""The experts of bench/gpu.py: layers of few and of many experts, by ours and by torch's grouped products.

bfloat16, gated, forward without gradients and a training step, recorded as CUDA graphs; tokens go to random experts, so
that all have about as many. Sorting the tokens is part of what is timed. The floor is the operations of the products,
or the bytes of weights and rows, over the rates of the device stage.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import gpu_timing
import torch
from gpu_device import known_rates
from gpu_running import Told, Work
from gpu_timing import all_captured, compared, in_brief, in_turn
from torch import Tensor

from fusion_kernels import fused_experts


@dataclass(frozen=True)
class Layer:
    """Experts, tokens, experts per token, inputs and outputs, neurons of an expert."""

    E: int
    T: int
    k: int
    d: int
    h: int


#: A quarter of Mixtral's experts, and half of those of Qwen3-30B-A3B.
LAYERS = {"8 experts": Layer(8, 8192, 2, 4096, 3584), "128 experts": Layer(128, 16384, 8, 2048, 384)}
BASE, BACKENDS = "grouped_mm", ("grouped_mm", "triton")


def lines(told: Told) -> Iterator[tuple[str, Work]]:
    """Layers both ways."""
    rates = known_rates(told)
    for name in LAYERS:
        yield f"{name}: forward", functools.partial(timed_layer, name, rates, trained=False)
        yield f"{name}: training step", functools.partial(timed_layer, name, rates, trained=True)


def jobs() -> dict[str, Callable[[], object]]:
    """Calls that launch everything that is timed here, by name."""
    return {f"experts of {name}": functools.partial(_once, name) for name in LAYERS}


def _once(name: str) -> None:
    for trained in (False, True):
        for step in _steps(LAYERS[name], trained).values():
            step()


def _steps(layer: Layer, trained: bool) -> dict[str, Callable[[], Any]]:
    g = torch.Generator(gpu_timing.DEVICE).manual_seed(0)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        found = torch.randn(*size, generator=g, device=gpu_timing.DEVICE).mul_(scale).to(gpu_timing.DTYPE)
        return found.requires_grad_(trained)

    x = draw(layer.T, layer.d)
    up, gate = (draw(layer.E, layer.h, layer.d, scale=layer.d**-0.5) for _ in range(2))
    down = draw(layer.E, layer.d, layer.h, scale=layer.h**-0.5)
    scores = torch.rand(layer.T, layer.E, generator=g, device=gpu_timing.DEVICE)
    weights, index = scores.topk(layer.k, dim=1)
    weights = (weights / weights.sum(1, keepdim=True)).to(gpu_timing.DTYPE)
    dy = torch.randn(layer.T, layer.d, generator=g, device=gpu_timing.DEVICE).to(gpu_timing.DTYPE)

    def step(backend: str) -> Any:
        if trained:
            y = fused_experts(x, index, weights, up, down, gate, backend=backend)
            return torch.autograd.grad(y, [x, up, gate, down], dy)
        with torch.no_grad():
            return fused_experts(x, index, weights, up, down, gate, backend=backend)

    return {backend: functools.partial(step, backend) for backend in BACKENDS}


def timed_layer(name: str, rates: dict[str, float], *, trained: bool) -> dict[str, Any]:
    """Milliseconds of a layer by each backend, ratios to torch's grouped products, and shares of the floor."""
    layer = LAYERS[name]
    graphs, refused = all_captured(_steps(layer, trained))
    rows = in_turn(graphs)
    operations = (3 if trained else 1) * 6 * layer.T * layer.k * layer.d * layer.h
    moved = (3 if trained else 1) * 2 * (3 * layer.E * layer.d * layer.h + 2 * layer.T * layer.k * layer.d)
    floor = 1e3 * max(operations / rates["bf16_flops"], moved / rates["copy_bytes"])
    found = {**asdict(layer), **compared(rows, BASE, floor), "not run": refused, "brief": in_brief(rows)}
    return {**found, "failed": f"triton: {refused['triton']}"} if "triton" in refused else found
