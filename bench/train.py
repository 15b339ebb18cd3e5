"""Train the fused MiniLM on sentences, beside the original: how fast, and that it starts where its checkpoint does.

    python bench/train.py [--data FOLDER] [--steps 30] [--rounds 3] [--out build/train.json]

The task needs no labels: a model learns to give every sentence the embedding that the original gives it (mean squared
error of mean-pooled last hidden states, AdamW). The fused model, whose scale is explicit, and the plain checkpoint that
it is saved as compute the same: the run fails if their first losses differ by more than rounding. Then steps of the
original, of the fused model and of the plain one are timed in turn: tokens per second, forward, backward and optimiser
together, medians over rounds. MiniLM's FFNs lie inside its layers, and are narrowed there: they run as torch runs any
module. On a GPU everything runs under bfloat16 autocast. With `--data`, sentences are the first columns of
`FOLDER/sst2_train.tsv`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
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
from fusion_kernels import backends
from mlp_fusion.running.sentences import read_sentences

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Batch = dict[str, Tensor]
SENTENCES = 64
#: Largest relative difference of the first losses: rounding.
TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}


def pooled(model: nn.Module, batch: Batch) -> Tensor:
    """(sentences, hidden) mean-pooled last hidden states."""
    mask = batch["attention_mask"].unsqueeze(-1)
    with torch.autocast(DEVICE.type, torch.bfloat16) if DEVICE.type == "cuda" else nullcontext():
        hidden = model(**batch).last_hidden_state
    return (hidden * mask).sum(1).float() / mask.sum(1)


class Run:
    """One model in training, a step at a time."""

    def __init__(self, model: nn.Module, batches: list[Batch], targets: list[Tensor]) -> None:
        self.model, self.targets = model.train(), targets
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        self.batches: Iterator[tuple[Batch, Tensor]] = itertools.cycle(zip(batches, targets, strict=True))

    def step(self) -> tuple[Tensor, int]:
        """The loss, on the device, and how many tokens there were."""
        batch, target = next(self.batches)
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

    with tempfile.TemporaryDirectory() as folder:
        fused.save_pretrained(folder)
        plain = AutoModel.from_pretrained(folder).to(DEVICE)
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    runs = {name: Run(model, batches, targets) for name, model in (("fused", fused), ("plain", plain))}
    losses = {name: [float(run.step()[0]) for _ in range(options.steps)] for name, run in runs.items()}
    difference = abs(losses["fused"][0] - losses["plain"][0]) / losses["plain"][0]
    print(f"loss {losses['fused'][0]:.6f} -> fused {losses['fused'][-1]:.6f}, plain {losses['plain'][-1]:.6f}")
    print(f"relative difference of the first losses: {difference:.1e}")
    if difference > TOLERANCE[DEVICE.type]:
        sys.exit("the fused model does not compute what its checkpoint does")

    timed_runs = {"original": Run(copy.deepcopy(original), batches, targets), **runs}
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
        "difference_of_first_losses": difference,
        "tokens_per_second": {name: statistics.median(values) for name, values in speeds.items()},
        "rounds": speeds,
    }
    rate = result["tokens_per_second"]
    print(f"tokens per second: { {name: round(value) for name, value in rate.items()} }")
    print(f"fused / original {rate['fused'] / rate['original']:.3f}, fused / plain {rate['fused'] / rate['plain']:.3f}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
