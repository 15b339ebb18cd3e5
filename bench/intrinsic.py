"""How many dimensions a task needs: SST-2 with d numbers trained, for d on a logarithmic grid, up to d90.

    python bench/intrinsic.py --data FOLDER [--ways said did] [--seeds 3] [--examples 2000] [--width 0.25]
    python bench/intrinsic.py --summary

The model is all-MiniLM-L6-v2, or the folder `--model`, with its FFNs as they are or, with `--width`, fused before.
Cells: `full`, all weights trained; `head`, the head alone; SAID and DID (`mlp_fusion.SaidConfig`) with d
numbers beside the head, which always trains. d90 is the smallest d whose accuracy is at least 0.9 of `full`, as in
Aghajanyan, Zettlemoyer and Gupta (arXiv 2012.13255). The grid is gone through from its lower end until that is reached,
for each seed, or with `--whole` to its upper end.

Every cell is written to `--out` when it is done, and what is there already is not run again: it can be stopped at any
time. An interrupted cell goes on from its last epoch.
"""

from __future__ import annotations

import argparse
import math
import platform
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from companions import biases_alone, first_rows, record, recorded
from support import model_folder
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import mlp_fusion
from mlp_fusion.finetuning.session import is_unfinished

WAYS = ("said", "did")
#: What a score has to reach, of that of all weights.
SHARE = 0.9
CALIBRATION = 512
#: What says which cell a row is.
KEY = ("base", "way", "d", "seed", "examples", "published_gradient")


def grid(low: int, high: int, per_decade: int) -> list[int]:
    """d from `low` to `high`, evenly by their logarithms, rounded to two digits."""
    steps = round(math.log10(high / low) * per_decade)
    exact = [low * 10 ** (i / per_decade) for i in range(steps + 1)]
    found = {int(float(f"{d:.1e}")) for d in exact}
    return sorted(d for d in found if low <= d <= high)


def load(seed: int, options: argparse.Namespace, train: list[dict[str, Any]]) -> Any:
    """The model of a cell, fused if that is asked for."""
    transformers.set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        options.model or model_folder(), id2label={0: "0", 1: "1"}, label2id={"0": 0, "1": 1}
    )
    if options.width is not None:
        text = [row["text"] for row in train[:CALIBRATION]]
        mlp_fusion.fuse(model, options.width, method="fusion", calibration=text, seed=seed)
    return model


def run_cell(cell: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Train one cell; its row, or what is there already."""
    for row in recorded(options.out):
        if all(row[key] == cell[key] for key in KEY):
            return row
    train, dev = (first_rows(options.data / f"sst2_{name}.tsv", None) for name in ("train", "dev"))
    train = train[: options.examples]
    model, way = load(cell["seed"], options, train), cell["way"]
    more: dict[str, Any] = {"learning_rate": options.full_rate}
    if way in WAYS:
        chosen = {"d": cell["d"], "structure_aware": way == "said", "seed": cell["seed"]}
        more = {
            "learning_rate": options.rate, "peft": "said",
            "peft_options": {**chosen, "published_gradient": options.published_gradient},
        }  # fmt: skip
    elif way == "head":
        biases_alone(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name.startswith("classifier"))
        more = {"learning_rate": options.rate}
    out = options.work / "-".join(str(cell[key]) for key in KEY)
    goes_on = is_unfinished(out)
    if not goes_on:
        shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(options.model or model_folder())
    report = mlp_fusion.finetune(
        model, out, train, dev, task="classification", seed=cell["seed"], tokenizer=tokenizer, resume=goes_on,
        epochs=options.epochs, weight_decay=0.0 if way in WAYS else 0.01, **more,
    )  # fmt: skip
    shutil.rmtree(out)
    assert report.final is not None
    row = {
        **cell, "accuracy": report.final["accuracy"], "loss": report.final["loss"], "epochs": options.epochs,
        "learning_rate": more["learning_rate"], "seconds": time.perf_counter() - started,
        "machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    record(options.out, row)
    print(f"{cell['base']} {way} d {cell['d']} seed {cell['seed']}: {row['accuracy']:.4f}", flush=True)
    return row


def scan(seed: int, options: argparse.Namespace) -> None:
    """All cells of a seed, as far up the grid as they are needed."""
    base = "as it is" if options.width is None else f"fused to {options.width:g}"
    shared = {"base": base, "seed": seed, "examples": options.examples}
    plain = {**shared, "d": None, "published_gradient": False}
    full = run_cell({**plain, "way": "full"}, options)
    run_cell({**plain, "way": "head"}, options)
    for way in options.ways:
        for d in grid(options.low, options.high, options.per_decade):
            cell = {**shared, "way": way, "d": d, "published_gradient": options.published_gradient}
            try:
                row = run_cell(cell, options)
            except mlp_fusion.InputError as error:  # fewer than the lambdas take, or more than there are entries
                print(f"{way} d {d} is left out: {error}", flush=True)
                continue
            if row["accuracy"] >= SHARE * full["accuracy"] and not options.whole:
                break


def d90(rows: Sequence[dict[str, Any]], full: float) -> int | None:
    """The smallest d whose accuracy, a mean over the seeds there are, is at least SHARE of `full`; None for none."""
    by_d: dict[int, list[float]] = {}
    for row in rows:
        by_d.setdefault(row["d"], []).append(row["accuracy"])
    return min((d for d, found in by_d.items() if statistics.mean(found) >= SHARE * full), default=None)


def summary(rows: Sequence[dict[str, Any]]) -> None:
    """Print d90 of every base and way, of each seed and of means over them, and the accuracies on the way."""
    bases = dict.fromkeys((row["base"], row["examples"]) for row in rows)
    for base, examples in bases:
        here = [row for row in rows if (row["base"], row["examples"]) == (base, examples)]
        fulls = {row["seed"]: row["accuracy"] for row in here if row["way"] == "full"}
        heads = [row["accuracy"] for row in here if row["way"] == "head"]
        if not fulls:
            continue
        mean = statistics.mean(fulls.values())
        alone = f", the head alone {statistics.mean(heads):.4f}" if heads else ""
        print(f"{base}, {examples or 'all'} examples: all weights {mean:.4f}{alone}, {len(fulls)} seeds")
        kinds = dict.fromkeys((r["way"], r["published_gradient"]) for r in here if r["way"] in WAYS)
        for way, published in kinds:
            own = [row for row in here if (row["way"], row["published_gradient"]) == (way, published)]
            each = [d90([row for row in own if row["seed"] == seed], full) for seed, full in sorted(fulls.items())]
            name = f"{way}, published gradient" if published else way
            print(f"  {name}: d90 {d90(own, mean)} (by seed {', '.join(map(str, each))})")
            for d in sorted({row["d"] for row in own}):
                found = [row["accuracy"] for row in own if row["d"] == d]
                print(f"    d {d:>8,}: {statistics.mean(found):.4f} ({len(found)} seeds)")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cells that are asked for, or print what there is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with sst2_train.tsv and sst2_dev.tsv")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--low", type=int, default=100, help="least d")
    parser.add_argument("--high", type=int, default=100_000, help="largest d")
    parser.add_argument("--per-decade", type=int, default=4, help="numbers d between two powers of ten")
    parser.add_argument("--whole", action="store_true", help="go through the grid beyond d90")
    parser.add_argument("--published-gradient", action="store_true", help="weigh gradients as the authors' code does")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, help="train on the first so many rows; all of them by default")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate of theta, lambda and the head")
    parser.add_argument("--full-rate", type=float, default=5e-5, help="learning rate of all weights")
    parser.add_argument("--width", type=float, help="fuse the FFNs to this share of their width before")
    parser.add_argument("--model", type=Path, help="folder of another model of BERT's shape")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("build/intrinsic"))
    parser.add_argument("--out", type=Path, default=Path("build/intrinsic.json"))
    parser.add_argument("--summary", action="store_true", help="print the results there are, and run nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.summary:
        summary(recorded(options.out))
        return
    if options.data is None:
        parser.error("--data FOLDER is needed")
    for seed in range(options.seeds):
        scan(seed, options)
    summary(recorded(options.out))


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    main()
