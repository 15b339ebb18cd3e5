"""Mixture-of-Experts models that are really trained, shrunk by what is inside the experts or by dropping experts.

    python bench/moe_quality.py --data FOLDER [--shapes mixtral qwen3 switch] [--seeds 3] [--out FILE]
    python bench/moe_quality.py --summary

Small models of three shapes, which the script first trains itself on nine tenths of `FOLDER/tiny_shakespeare.txt`: two
causal language models, and an encoder-decoder that goes on with what the encoder reads. Each is reduced to shares of
its experts' parameters: `fusion` and `prune` narrow every expert and leave routers alone, `reap` and `mone` drop
experts (see moe_experts.py), and so does `random`. All but `fusion, no data`, `synthetic` and `random` learn from the
first blocks of the training text; `synthetic` does from as many tokens that need none. Perplexity is that of the last
tenth, before and, for some, after a short fine-tune.

A run is one shape and seed, and one line of `--out`. What is in `--out` already is not run again; where rows are
missing, the model is trained once more, and has to come out as it did.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from moe_experts import constant_experts, drop_experts, expert_statistics, highest, moe_blocks
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

import mlp_fusion
from fusion_kernels import backends

Batch = dict[str, Tensor]

#: Tokens of a block, blocks of a batch, blocks to calibrate on and to measure on.
LENGTH, BATCH, CALIBRATION, HELD_OUT = 128, 8, 128, 160
#: Tokens of a block that the encoder of `switch` reads; the decoder writes the others.
CONTEXT = 32
VOCABULARY = 1024
#: Shape -> steps of its training, and the learning rate.
RECIPES: dict[str, tuple[int, float]] = {
    "mixtral": (1000, 3e-3),
    "qwen3": (1000, 3e-3),
    "switch": (1200, 6e-3),
    "mixtral-wide": (600, 2e-3),
}
SHARES = (0.75, 0.5, 0.25)
#: Of the fine-tune.
TUNE_STEPS, TUNE_RATE = 100, 3e-4
TUNE_SHARE = 0.5
TUNED = ("fusion, no data", "auto", "fusion", "prune", "reap", "mone")
#: How many draws of random experts.
DRAWS = 3
#: Method -> options of `fuse`; None for what drops experts.
METHODS: dict[str, dict[str, Any] | None] = {
    "fusion, no data": {"calibration": None},
    "synthetic": {"calibration": None, "synthetic": CALIBRATION * LENGTH},
    "auto": {},
    "fusion": {"method": "fusion"},
    "fusion, sequential": {"method": "fusion", "sequential": True},
    "prune": {"method": "prune"},
    "prune, sequential": {"method": "prune", "sequential": True},
    "reap": None,
    "mone": None,
    "random": None,
}


def mixtral(width: int = 128) -> Any:
    """8 experts, two for each token."""
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY, hidden_size=128, intermediate_size=width, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, router_aux_loss_coef=0.01,
            max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def qwen3() -> Any:
    """16 experts of 64, four for each token."""
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCABULARY, hidden_size=128, moe_intermediate_size=64, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=16, num_experts_per_tok=4,
            norm_topk_prob=True, router_aux_loss_coef=0.01, max_position_embeddings=LENGTH, bos_token_id=0,
            eos_token_id=0,
        )
    )  # fmt: skip


def switch() -> Any:
    """8 experts of 128 in every second layer of encoder and decoder, one for each token, never beyond capacity."""
    return SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(
            vocab_size=VOCABULARY, d_model=128, d_kv=32, d_ff=128, num_layers=4, num_decoder_layers=4,
            num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, num_heads=4, num_experts=8, dropout_rate=0.0,
            expert_capacity=2 * LENGTH, router_aux_loss_coef=0.01, pad_token_id=0, eos_token_id=0,
            decoder_start_token_id=0,
        )
    )  # fmt: skip


def mixtral_wide() -> Any:
    """The same with experts of 256, which is more than so short a training makes use of."""
    return mixtral(256)


SHAPES: dict[str, Callable[[], Any]] = {
    "mixtral": mixtral,
    "qwen3": qwen3,
    "switch": switch,
    "mixtral-wide": mixtral_wide,
}


class Text:
    """Blocks of tokens to train, calibrate and measure on, as batches of one shape of model."""

    def __init__(self, data: Path, shape: str) -> None:
        text = (data / "tiny_shakespeare.txt").read_text(encoding="utf-8")
        cut = len(text) * 9 // 10
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator([text[:cut]], vocab_size=VOCABULARY, special_tokens=["<pad>"], show_progress=False)
        self.shape = shape
        self.train, self.held_out = (torch.tensor(bpe.encode(part).ids) for part in (text[:cut], text[cut:]))
        self.calibration = self._fixed(self.train, CALIBRATION)
        self.evaluation = self._fixed(self.held_out, HELD_OUT)

    def _fixed(self, tokens: Tensor, count: int) -> list[Batch]:
        """The first blocks."""
        return [self.batch(blocks) for blocks in tokens[: count * LENGTH].view(-1, BATCH, LENGTH)]

    def drawn(self, generator: torch.Generator) -> Batch:
        """A batch of blocks that start anywhere in the training text."""
        starts = torch.randint(len(self.train) - LENGTH, (BATCH, 1), generator=generator)
        return self.batch(self.train[starts + torch.arange(LENGTH)])

    def batch(self, blocks: Tensor) -> Batch:
        """What the model is called with: next tokens for a causal model, how a block goes on for the other."""
        if self.shape != "switch":
            return {"input_ids": blocks, "labels": blocks}
        return {"input_ids": blocks[:, :CONTEXT].contiguous(), "labels": blocks[:, CONTEXT:].contiguous()}


def train(model: Any, text: Text, steps: int, rate: float, seed: int) -> float:
    """AdamW with a warm-up and a fall to nothing, with the routers' balancing loss; the last losses' mean."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=rate, betas=(0.9, 0.98), weight_decay=0.1
    )
    warm = max(steps // 20, 5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, max(steps - step, 0) / max(steps - warm, 1))
    )
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**text.drawn(generator), output_router_logits=True).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    model.eval()
    return statistics.mean(losses[-20:])


@torch.no_grad()
def perplexity(model: Any, batches: list[Batch]) -> float:
    """Of all batches, which are of one size."""
    model.eval()
    return math.exp(statistics.mean(model(**batch).loss.item() for batch in batches))


def parameters(model: Any) -> int:
    """How many parameters the model has."""
    return sum(p.numel() for p in model.parameters())


def reduced(original: Any, name: str, share: float, text: Text, seed: int, known: Any) -> Any:
    """A copy of the model with `share` of its experts' parameters."""
    model = copy.deepcopy(original)
    asked = METHODS[name]
    if asked is not None:
        options = {"calibration": text.calibration, "optimizer": "adamw", "seed": seed, **asked}
        mlp_fusion.fuse(model, share, layers="*.experts*", **options)
        return model
    count = round(share * moe_blocks(model)[0].experts.num_experts)
    if name == "random":
        generator = torch.Generator().manual_seed(seed)
        drop_experts(model, [highest(torch.rand(len(k.tokens), generator=generator), count) for k in known])
    elif name == "reap":
        drop_experts(model, [highest(k.saliency, count) for k in known])
    else:
        constant_experts(model, [highest(k.redundancy, count) for k in known], known)
    return model


def wanted() -> list[tuple[float, str]]:
    """Share and method of every row of a run."""
    # At three quarters, sequential calibration has nothing left to win.
    return [(share, name) for share in SHARES for name in METHODS if "sequential" not in name or share < SHARES[0]]


def run(shape: str, seed: int, text: Text, tune_steps: int, earlier: dict[str, Any] | None) -> dict[str, Any]:
    """Train a model, and measure what is left of it, but for the rows of an `earlier` run."""
    steps, rate = RECIPES[shape]
    transformers.set_seed(seed)
    original = SHAPES[shape]()
    started = time.perf_counter()
    loss = train(original, text, steps, rate, seed)
    seconds = time.perf_counter() - started
    before = perplexity(original, text.evaluation)
    print(f"{shape} {seed}: loss {loss:.3f}, perplexity {before:.2f}, {seconds:.0f} s", flush=True)
    if earlier is not None and earlier["whole"]["perplexity"] != before:
        raise SystemExit(f"{shape} {seed}: perplexity was {earlier['whole']['perplexity']}: give another --out")
    known = expert_statistics(original, text.calibration)
    rows = {(row["share"], row["method"]): row for row in (earlier or {"rows": []})["rows"]}
    for share, name in wanted():
        if (share, name) in rows:
            continue
        row = rows[share, name] = _row(original, name, share, text, seed, known, tune_steps)
        print(f"  {share} {name:20}", {k: v for k, v in row.items() if k not in ("method", "share")}, flush=True)
    ordered = [rows[place] for place in wanted()]
    if earlier is not None:
        return {**earlier, "rows": ordered}
    whole = {"perplexity": before, "parameters": parameters(original)}
    if tune_steps:
        whole["tuned"] = _tuned(copy.deepcopy(original), text, tune_steps, seed)
    return {
        "shape": shape, "seed": seed, "steps": steps, "learning_rate": rate, "train_loss": loss,
        "train_seconds": seconds, "whole": whole,
        "tokens_per_expert": [k.tokens.int().tolist() for k in known], "rows": ordered,
    }  # fmt: skip


def _row(original: Any, name: str, share: float, text: Text, seed: int, known: Any, tune_steps: int) -> dict[str, Any]:
    started = time.perf_counter()
    draws = [
        reduced(original, name, share, text, DRAWS * seed + n, known) for n in range(DRAWS if name == "random" else 1)
    ]
    seconds = (time.perf_counter() - started) / len(draws)
    row = {
        "method": name, "share": share, "perplexity": statistics.median(perplexity(m, text.evaluation) for m in draws),
        "parameters": parameters(draws[0]), "seconds": round(seconds, 2),
    }  # fmt: skip
    if tune_steps and share == TUNE_SHARE and name in TUNED:
        row["tuned"] = _tuned(draws[0], text, tune_steps, seed)
    return row


def _tuned(model: Any, text: Text, steps: int, seed: int) -> float:
    # Other batches than those of the first steps of the training.
    train(model, text, steps, TUNE_RATE, 1000 + seed)
    return perplexity(model, text.evaluation)


def medians(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per shape, method and share: the median over seeds of the perplexity, and of what it is to the whole model's."""
    found = []
    for shape in dict.fromkeys(r["shape"] for r in runs):
        of_shape = [r for r in runs if r["shape"] == shape]
        whole = [r["whole"] for r in of_shape]
        found.append({"shape": shape, "method": "whole", "share": 1.0, **_median(whole, whole)})
        for place in [(row["share"], row["method"]) for row in of_shape[0]["rows"]]:
            # Of runs to which a method was added later, not all may have it yet.
            pairs = [(row, r["whole"]) for r in of_shape for row in r["rows"] if (row["share"], row["method"]) == place]
            rows, wholes = zip(*pairs, strict=True)
            found.append({"shape": shape, "method": place[1], "share": place[0], **_median(rows, wholes)})
    return found


def _median(rows: Sequence[dict[str, Any]], whole: Sequence[dict[str, Any]]) -> dict[str, Any]:
    ratios = [row["perplexity"] / w["perplexity"] for row, w in zip(rows, whole, strict=True)]
    result = {
        "perplexity": statistics.median(row["perplexity"] for row in rows),
        "ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)],
        "parameters": rows[0]["parameters"], "seeds": len(rows),
    }  # fmt: skip
    # Of fewer seeds than the others, so that only the ratio to the same seed's whole model can stand beside them.
    if tuned := [row["tuned"] / w["perplexity"] for row, w in zip(rows, whole, strict=True) if "tuned" in row]:
        result |= {"tuned_ratio": statistics.median(tuned), "tuned_seeds": len(tuned)}
    return result


def recorded(file: Path) -> list[dict[str, Any]]:
    """The runs in `file`; none if there is no such file yet."""
    return json.loads(file.read_text(encoding="utf-8"))["runs"] if file.is_file() else []


def record(file: Path, runs: list[dict[str, Any]]) -> None:
    """Write all runs and what they have in common; a run is a line, and so is a median."""
    runs = sorted(runs, key=lambda r: (list(SHAPES).index(r["shape"]), r["seed"]))
    head = {
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "gpu": None},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "backends": backends(),
        "text": {
            "source": "tiny Shakespeare", "vocabulary": VOCABULARY, "calibration_tokens": CALIBRATION * LENGTH,
            "held_out_tokens": HELD_OUT * LENGTH,
        },
        "training": {"batch": BATCH, "length": LENGTH},
        "tuning": {"steps": TUNE_STEPS, "learning_rate": TUNE_RATE, "share": TUNE_SHARE},
        "seeds": sorted({r["seed"] for r in runs}),
    }  # fmt: skip
    lines = [f'"{key}": {json.dumps(value)}' for key, value in head.items()]
    for key, rows in (("medians", medians(runs)), ("runs", runs)):
        lines.append(f'"{key}": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def summary(file: Path) -> None:
    """Print the medians."""
    for row in medians(recorded(file)):
        low, high = row["ratio_range"]
        tuned = f", tuned x {row['tuned_ratio']:.3f} ({row['tuned_seeds']})" if "tuned_ratio" in row else ""
        print(
            f"{row['shape']:8} {row['method']:20} {row['share']:.2f}: {row['perplexity']:8.2f}, "
            f"x {row['ratio']:.3f} ({low:.3f} to {high:.3f}), {row['seeds']} seeds{tuned}"
        )


def main() -> None:
    """Run what is not in the file yet, seed by seed, or print what is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with tiny_shakespeare.txt")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES)[:3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tuned-seeds", type=int, default=1, help="seeds that are fine-tuned too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench/results/moe-quality-cpu.json"))
    parser.add_argument("--summary", action="store_true", help="print the results there are, and run nothing")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    if options.summary:
        summary(options.out)
        return
    if options.data is None:
        parser.error("--data FOLDER is needed")
    for seed in range(options.seeds):
        for shape in options.shapes:
            runs = recorded(options.out)
            others = [r for r in runs if (r["shape"], r["seed"]) != (shape, seed)]
            earlier = next((r for r in runs if r not in others), None)
            if earlier is not None and {(row["share"], row["method"]) for row in earlier["rows"]} >= {*wanted()}:
                continue
            tune_steps = TUNE_STEPS if seed < options.tuned_seeds else 0
            text = Text(options.data, shape)
            record(options.out, [*others, run(shape, seed, text, tune_steps, earlier)])
    summary(options.out)


if __name__ == "__main__":
    main()
