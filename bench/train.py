"""Train the fused MiniLM on sentences with and without the fused kernels: the same losses, and how fast.

    python bench/train.py [--data FOLDER] [--steps 30] [--rounds 3] [--out build/train.json]

The task needs no labels: the fused model learns to give every sentence the embedding that the original gives it (mean
squared error of mean-pooled last hidden states, AdamW). It is run in three ways from the same fused weights, on the
same batches:

    plain      the projections one by one, as torch runs any module (hooks that do nothing hang on them)
    reference  the fused operator, in its reference backend
    kernels    the fused operator, in the backend that answers here

The run fails if their losses differ by more than rounding. Then steps of the original model, of `plain` and of
`kernels` are timed in turn: tokens per second, forward, backward and optimiser together, medians over rounds. On a GPU
everything runs under bfloat16 autocast. With `--data`, sentences are the first columns of `FOLDER/sst2_train.tsv`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from support import model_folder
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import mlp_fusion
from fusion_kernels import backends, mlp_backend
from mlp_fusion.modules import FusedFFN
from mlp_fusion.running.sentences import read_sentences

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Batch = dict[str, Tensor]
SENTENCES = 64
#: Largest relative difference of two losses after the same step: rounding, grown by training on it.
TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}


def pooled(model: nn.Module, batch: Batch) -> Tensor:
    """(sentences, hidden) mean-pooled last hidden states."""
    mask = batch["attention_mask"].unsqueeze(-1)
    with torch.autocast(DEVICE.type, torch.bfloat16) if DEVICE.type == "cuda" else nullcontext():
        hidden = model(**batch).last_hidden_state
    return (hidden * mask).sum(1).float() / mask.sum(1)


def through_children(model: nn.Module) -> nn.Module:
    """The same model, whose fused FFNs have to call their projections."""
    for module in model.modules():
        if isinstance(module, FusedFFN):
            for role in module.ROLES:
                module.projection(role).register_forward_hook(lambda *_: None)
    return model


class Run:
    """One model in training, a step at a time."""

    def __init__(self, model: nn.Module, batches: list[Batch], targets: list[Tensor], backend: str = "auto") -> None:
        self.model, self.backend, self.targets = model.train(), backend, targets
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        self.batches: Iterator[tuple[Batch, Tensor]] = itertools.cycle(zip(batches, targets, strict=True))

    def step(self) -> tuple[Tensor, int]:
        """The loss, on the device, and how many tokens there were."""
        batch, target = next(self.batches)
        with mlp_backend(self.backend):
            loss = (pooled(self.model, batch) - target).square().mean()
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach(), batch["input_ids"].numel()


def timed(run: Run, steps: int) -> float:
    """Tokens per second over `steps` steps."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    started, tokens = time.perf_counter(), 0
    for _ in range(steps):
        tokens += run.step()[1]
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return tokens / (time.perf_counter() - started)


def main() -> None:
    """Train, compare, time, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with sst2_train.tsv")
    parser.add_argument("--steps", type=int, default=30, help="steps of the comparison, and of every timed round")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--out", type=Path, default=Path("build/train.json"))
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="a fused FFN holds")
    file = None if options.data is None else options.data / "sst2_train.tsv"
    sentences = read_sentences(file, limit=512)
    original = AutoModel.from_pretrained(model_folder()).to(DEVICE).eval()
    for module in original.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # or no two runs would be comparable
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    ordered = sorted(sentences, key=len)
    found = [
        dict(tokenizer(ordered[i : i + SENTENCES], padding=True, truncation=True, max_length=128, return_tensors="pt"))
        for i in range(0, len(ordered) - SENTENCES + 1, SENTENCES)
    ]
    batches: list[Batch] = [{k: v.to(DEVICE) for k, v in batch.items()} for batch in found]
    with torch.no_grad():
        targets = [pooled(original, batch) for batch in batches]
    fused = copy.deepcopy(original)
    mlp_fusion.fuse(fused, options.width, optimizer="adamw", sample=found[:2])

    runs = {
        "plain": Run(through_children(copy.deepcopy(fused)), batches, targets),
        "reference": Run(copy.deepcopy(fused), batches, targets, "reference"),
        "kernels": Run(copy.deepcopy(fused), batches, targets, backends()["mlp"][DEVICE.type]),
    }
    losses = {name: [float(run.step()[0]) for _ in range(options.steps)] for name, run in runs.items()}
    difference = max(
        abs(a - b) / abs(b)
        for name in ("reference", "kernels")
        for a, b in zip(losses[name], losses["plain"], strict=True)
    )
    print(f"loss {losses['plain'][0]:.6f} -> plain {losses['plain'][-1]:.6f}, kernels {losses['kernels'][-1]:.6f}")
    print(f"largest relative difference of two losses: {difference:.1e}")
    if difference > TOLERANCE[DEVICE.type]:
        sys.exit("the kernels do not train as the plain modules do")

    timed_runs = {
        "original": Run(copy.deepcopy(original), batches, targets),
        "plain": runs["plain"],
        "kernels": runs["kernels"],
    }
    speeds: dict[str, list[float]] = {name: [] for name in timed_runs}
    for _ in range(options.rounds):
        for name, run in timed_runs.items():
            speeds[name].append(timed(run, options.steps))
    result: dict[str, Any] = {
        "machine": {
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if DEVICE.type == "cuda" else None,
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "backends": backends(),
        "tokens per step": [batch["input_ids"].numel() for batch in batches],
        "sentences": {"source": "the package's" if file is None else file.name, "count": len(sentences)},
        "width": options.width,
        "losses": losses,
        "largest_relative_difference": difference,
        "tokens_per_second": {name: statistics.median(values) for name, values in speeds.items()},
        "rounds": speeds,
    }
    rate = result["tokens_per_second"]
    print(f"tokens per second: { {name: round(value) for name, value in rate.items()} }")
    print(f"kernels / plain {rate['kernels'] / rate['plain']:.3f}, kernels / original ", end="")
    print(f"{rate['kernels'] / rate['original']:.3f}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
