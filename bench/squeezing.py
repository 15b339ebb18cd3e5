"""Dimension squeezing beside fusion and singular values, at equal parameters: accuracy on SST-2.

    python bench/squeezing.py --data FOLDER [--shares 0.9 0.8 0.7] [--examples 2000] [--epochs 1] [--seeds 3]
    python bench/squeezing.py --summary

all-MiniLM-L6-v2 is fine-tuned first (`full`). From there, `squeeze` cuts bonds of all matrices but embeddings
(`squeeze, embeddings too`: of all), a share of the parameters a round, and tunes the small tensors before the first and
after each; the others go to each share at once and tune all weights for as many steps as squeezing has had by then:
`fusion`, the FFNs fused, where 1/32 of their width is enough; `svd`, all matrices and the embeddings as two factors,
cut where the relative squared error is least for each parameter. `fusion, then squeeze` is `squeeze --width`, with the
FFNs fused to `--width`.

Every row of a seed is written to `--out` when it is done, and what is there already is not run again.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from companions import classifier, first_rows, record, recorded
from support import model_folder
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import mlp_fusion
from mlp_fusion.choices import PEFT_RATES
from mlp_fusion.companions.mpo import chain_targets

#: Learning rates at their peaks: of all weights, and of chains' small tensors.
RATE, CHAIN_RATE = 1e-4, PEFT_RATES["mpo"]
#: The narrowest FFNs.
LEAST = 1 / 32


def data_of(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    known = first_rows(options.data / "sst2_train.tsv", options.examples)
    return known, first_rows(options.data / "sst2_dev.tsv", None)


def tuned(model: Any, out: Path, epochs: float, options: argparse.Namespace) -> dict[str, float]:
    """Accuracy and loss after fine-tuning all weights."""
    shutil.rmtree(out, ignore_errors=True)
    folder = options.model or model_folder()
    report = mlp_fusion.finetune(
        model, out, *data_of(options), task="classification", epochs=epochs, learning_rate=RATE,
        tokenizer=AutoTokenizer.from_pretrained(folder), seed=options.seed,
    )  # fmt: skip
    assert report.initial is not None
    assert report.final is not None
    return {"before": report.initial["accuracy"], "accuracy": report.final["accuracy"], "loss": report.final["loss"]}


def base(options: argparse.Namespace) -> Path:
    """The fine-tuned model's folder."""
    out: Path = options.work / f"full-{options.seed}"
    if not (out / "finetune.json").is_file():
        tuned(classifier(options.model or model_folder(), options.seed), out, options.epochs, options)
    return out


def loaded(options: argparse.Namespace) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(base(options))


def full_row(options: argparse.Namespace) -> list[dict[str, Any]]:
    final = json.loads((base(options) / "finetune.json").read_text(encoding="utf-8"))["final"]
    count = loaded(options).num_parameters()
    return [{"share": 1.0, "parameters": count, "accuracy": final["accuracy"], "loss": final["loss"]}]


class LowRankEmbedding(nn.Module):
    """An embedding as two factors; what it is asked of besides is that of its table."""

    def __init__(self, table: Tensor, back: Tensor) -> None:
        super().__init__()
        self.table, self.back = nn.Parameter(table), nn.Parameter(back)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.table) @ self.back


def factorised(model: Any, count: int) -> Any:
    """The model with its matrices as two factors where that is smaller, `count` parameters in all."""
    names = chain_targets(model, embeddings=True)
    found = {}
    for name in names:
        weight = model.get_submodule(name).weight.detach()
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        rows, columns = weight.shape
        found[name] = (u, s, v, rows + columns, s.double().square() / s.double().square().sum() / (rows + columns))
    sizes = {name: model.get_submodule(name).weight.numel() for name in names}
    rest = model.num_parameters() - sum(sizes.values())

    def ranks(threshold: float) -> dict[str, int]:
        return {name: max(1, int((gain > threshold).sum())) for name, (*_, gain) in found.items()}

    def stored(of: dict[str, int]) -> int:
        return rest + sum(min(sizes[name], rank * found[name][3]) for name, rank in of.items())

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if stored(ranks(middle)) <= count else (middle, high)
    for name, rank in ranks(high).items():
        u, s, v, cost, _ = found[name]
        if rank * cost >= sizes[name]:
            continue
        module = model.get_submodule(name)
        parent, _, own = name.rpartition(".")
        first, second = u[:, :rank] * s[:rank], v[:rank]
        if isinstance(module, nn.Embedding):
            made: nn.Module = LowRankEmbedding(first.contiguous(), second.contiguous())
        else:
            inner = nn.Linear(second.shape[1], rank, bias=False)
            outer = nn.Linear(rank, first.shape[0])
            inner.weight.data, outer.weight.data, outer.bias.data = second.clone(), first.clone(), module.bias.data
            made = nn.Sequential(inner, outer)
        setattr(model.get_submodule(parent), own, made)
    return model


def other_row(way: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Fusion or singular values, at every share."""
    made = []
    for number, share in enumerate(options.shares, 1):
        model = loaded(options)
        count = int(share * model.num_parameters())
        if way == "svd":
            model = factorised(model, count)
        else:
            width = fitting_width(model, count)
            if width is None:
                continue
            text = [row["text"] for row in data_of(options)[0][:512]]
            mlp_fusion.fuse(model, width, calibration=text, seed=options.seed)
        size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        # Squeezing trains before its first cut, too.
        known = tuned(model, options.work / "tuned", (number + 1) * options.epochs, options)
        made.append({"share": share, "parameters": size, **known})
    return made


def fitting_width(model: Any, count: int) -> int | None:
    """Neurons of each FFN with which the model has at most `count` parameters; None where even few are too many."""
    config = model.config
    neuron = 2 * config.hidden_size + 1
    spare = (model.num_parameters() - count) / (neuron * config.num_hidden_layers)
    width = int(config.intermediate_size - spare) // 8 * 8  # as engines need it
    return width if width >= LEAST * config.intermediate_size else None


def squeeze_row(way: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rounds of squeezing."""
    out = options.work / "squeezed"
    shutil.rmtree(out, ignore_errors=True)
    step = max(a - b for a, b in itertools.pairwise([1.0, *options.shares]))
    report = mlp_fusion.squeeze(
        base(options), out, *data_of(options), task="classification", target_parameters=options.shares[-1],
        round_share=step, epochs=options.epochs, learning_rate=CHAIN_RATE, seed=options.seed,
        width=options.width if "fusion" in way else None, embeddings="embeddings" in way,
    )  # fmt: skip
    shutil.rmtree(out)
    keys = ("parameters", "accuracy", "loss", "error")
    return [{"share": one["parameters"] / report.whole, **{k: one[k] for k in keys}} for one in report.rounds]


ROWS = {
    "full": full_row,
    "squeeze": lambda options: squeeze_row("squeeze", options),
    "squeeze, embeddings too": lambda options: squeeze_row("squeeze, embeddings too", options),
    "fusion, then squeeze": lambda options: squeeze_row("fusion, then squeeze", options),
    "fusion": lambda options: other_row("fusion", options),
    "svd": lambda options: other_row("svd", options),
}


def summary(rows: Sequence[dict[str, Any]]) -> None:
    """Print a line for every point."""
    for row in rows:
        for point in row["points"]:
            what = f"{row['row']:22} seed {row['asked']['seed']} {point['parameters']:>12,}"
            print(f"{what} ({point['share']:.1%}): {point['accuracy']:.4f}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the rows that are asked for, or print what there is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with sst2_train.tsv and sst2_dev.tsv")
    parser.add_argument("--rows", default="*", help="which rows, as a pattern")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.9, 0.8, 0.7], help="of the parameters, falling")
    parser.add_argument("--width", type=float, default=0.5, help="of FFNs that are fused before they are squeezed")
    parser.add_argument("--examples", type=int, help="train on the first so many rows; all of them by default")
    parser.add_argument("--epochs", type=float, default=1.0, help="of the first fine-tuning, and of every round")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0 on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", type=Path, help="folder of another model of BERT's shape")
    parser.add_argument("--work", type=Path, default=Path("build/squeezing"))
    parser.add_argument("--out", type=Path, default=Path("build/squeezing.json"))
    parser.add_argument("--summary", action="store_true", help="print the results there are, and run nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.summary:
        summary(recorded(options.out))
        return
    if options.data is None:
        parser.error("--data FOLDER is needed")
    done = {(row["row"], row["asked"]["seed"]) for row in recorded(options.out)}
    for seed, (name, run) in itertools.product(range(options.seeds), ROWS.items()):
        options.seed = seed
        if fnmatch.fnmatch(name, options.rows) and (name, seed) not in done:
            machine = {"machine": platform.machine(), "threads": options.threads, "torch": torch.__version__}
            asked = {key: getattr(options, key) for key in ("examples", "epochs", "seed", "width")}
            record(options.out, {"row": name, "points": run(options), "asked": asked, **machine})
            summary(recorded(options.out)[-1:])


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    main()
