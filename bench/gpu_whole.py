"""From end to end, for bench/gpu.py: `compress` on the GPU and on the CPU, and tokens per second in training.

`--model FOLDER` names checkpoints to compress; without one it is a random one of Llama's shape with few layers. The
product chooses its backends by itself, among those that the proofs stage has proved. Training is that of a stack of
residual FFNs under bfloat16 autocast with AdamW: `FusedMLP` by each backend beside `torch.nn.Sequential` of the same
width, and the wide stack that it came from.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_timing
import torch
from gpu_running import Told, Work
from gpu_timing import in_brief, in_turn, require
from torch import Tensor, nn

import mlp_fusion
from fusion_kernels import backends, native
from fusion_kernels.mlp import mlp_backend
from mlp_fusion import FusedMLP

WIDTH = 0.25
#: Of the random checkpoint: layers, hidden size, neurons, vocabulary.
LLAMA = {"num_hidden_layers": 4, "hidden_size": 1024, "intermediate_size": 2816, "vocab_size": 4096}
#: Of the stack: tokens of a step, blocks, inputs, neurons before and after.
TOKENS, BLOCKS, D, BEFORE, AFTER = 16_384, 6, 768, 3072, 768
PINNED = ("torch", "cublas", "epilogue")


def lines(told: Told) -> Iterator[tuple[str, Work]]:
    """Training first: it says most."""
    yield "training", training
    scratch = Path(told.options["scratch"])
    models = [Path(folder) for folder in told.options["models"]]
    for folder in models or [scratch / "llama"]:
        prepare = (lambda: None) if models else functools.partial(random_llama, scratch / "llama")
        yield f"compress {folder.name}", functools.partial(compressed, folder, scratch, prepare)


def jobs() -> dict[str, Callable[[], object]]:
    """Calls that launch what is trained here, by name."""
    return {"whole training": _one_step_each}


# --- training --------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A block of ordinary layers, or a fused one, behind a norm and around it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm, self.block = nn.LayerNorm(D), block

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(self.norm(x))


def stack(width: int, fused: bool) -> nn.Module:
    """The blocks, the same weights for the same width."""
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    for _ in range(BLOCKS):
        first, second = nn.Linear(D, width), nn.Linear(width, D)
        layers = nn.Sequential(first, nn.GELU(), second)
        blocks.append(Residual(FusedMLP.from_mlp(first, second, "gelu") if fused else layers))
    return nn.Sequential(*blocks).to(gpu_timing.DEVICE)


def training_steps() -> dict[str, Callable[[], Tensor]]:
    """A step of each: forward, backward, optimiser; returns the loss."""
    x = torch.randn(TOKENS, D, device=gpu_timing.DEVICE)
    target = torch.randn(TOKENS, D, device=gpu_timing.DEVICE)

    def stepping(model: nn.Module, backend: str | None) -> Callable[[], Tensor]:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

        def step() -> Tensor:
            pinned = contextlib.nullcontext() if backend is None else mlp_backend(backend)
            with pinned, torch.autocast(torch.device(gpu_timing.DEVICE).type, gpu_timing.DTYPE):
                loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return step

    steps = {
        "Sequential, wide": stepping(stack(BEFORE, False), None),
        "Sequential": stepping(stack(AFTER, False), None),
    }
    steps["FusedMLP, auto"] = stepping(stack(AFTER, True), None)
    for name in PINNED:
        steps[f"FusedMLP, {name}"] = stepping(stack(AFTER, True), name)
    return steps


def _one_step_each() -> None:
    for name, step in training_steps().items():
        if "auto" not in name:  # which would prove and measure
            step()


def training() -> dict[str, Any]:
    """Tokens per second of each, and that their first losses agree within what bfloat16 leaves."""
    steps = training_steps()
    losses = {name: float(step()) for name, step in steps.items()}
    for name, loss in losses.items():
        apart = abs(loss / losses["Sequential"] - 1)
        right = "wide" in name or (math.isfinite(loss) and apart < 2e-2)
        require(right, f"the first loss of {name} is {loss}, that of Sequential {losses['Sequential']}")
    rows = in_turn(steps, seconds=4.0)
    rate = {name: 1e3 * TOKENS / row["median"] for name, row in rows.items()}
    return {
        "tokens": TOKENS, "blocks": BLOCKS, "d": D, "neurons": [BEFORE, AFTER], "ms": rows, "tokens per second": rate,
        "times Sequential": {name: value / rate["Sequential"] for name, value in rate.items()}, "first losses": losses,
        "backends": backends()["mlp"], "brief": in_brief(rows),
    }  # fmt: skip


# --- compress --------------------------------------------------------------------------------------------------------


def random_llama(folder: Path) -> None:
    """A checkpoint with random weights, in bfloat16."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 128}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA, **heads))
    model.to(torch.bfloat16).save_pretrained(folder)


def compressed(folder: Path, scratch: Path, prepare: Callable[[], None]) -> dict[str, Any]:
    """Seconds of `compress` on the device, twice, and on the CPU, and what the reports say of the results."""
    prepare()
    seconds: dict[str, float] = {}
    errors: dict[str, Any] = {}
    runs = [("device, first", gpu_timing.DEVICE), ("device", gpu_timing.DEVICE)]
    if native.UNAVAILABLE is None:  # the reference would take all the time there is
        runs.append(("CPU", "cpu"))
    for name, device in runs:
        began = time.perf_counter()
        out = scratch / f"{folder.name}-{name.replace(', ', '-')}"
        report = mlp_fusion.compress(folder, out, WIDTH, device=device)
        seconds[name] = time.perf_counter() - began
        errors[name] = [row.output_error for row in report.rows]
    found: dict[str, Any] = {"model": folder.name, "width": WIDTH, "seconds": seconds, "errors of the FFNs": errors}
    if "CPU" in seconds:
        found["times faster"] = seconds["CPU"] / seconds["device"]
    else:
        found["without the CPU"] = native.UNAVAILABLE
    brief = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    return {**found, "kmeans": backends()["kmeans"], "brief": brief}
