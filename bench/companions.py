"""Companion methods beside what peft has: what a step costs, and how well they learn SST-2.

    python bench/companions.py --data FOLDER [--rows 'quarter *'] [--seeds 3] [--examples 2000] [--epochs 3]
    python bench/companions.py --rows 'step *'
    python bench/companions.py --summary

Rows `step METHOD` time steps on all-MiniLM-L6-v2 with a classifier, of 32 texts of 128 random tokens: seconds of a step
(the median), how far it raises the memory of the process, and the bytes of what is stored. Rows `full METHOD` and
`quarter METHOD` fine-tune the same model, with its FFNs as they are or fused to a quarter of their width, on the first
`--examples` rows of `FOLDER/sst2_train.tsv`, and measure on `FOLDER/sst2_dev.tsv`: accuracy, numbers that are trained,
bytes that are stored, seconds of a step (the median).

Every row is written to `--out` when it is done, and what is there already is not run again: it can be stopped at any
time. An interrupted fine-tuning goes on from its last epoch. `--list` prints the rows.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import peak_bytes
from peft import PeanutConfig, SupertuningConfig, get_peft_model
from support import model_folder
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import mlp_fusion
from mlp_fusion.choices import FULL_RATE, PEFT_RATES
from mlp_fusion.companions.ffns import ffn_projections
from mlp_fusion.companions.making import make_config
from mlp_fusion.finetuning.data import read_rows
from mlp_fusion.finetuning.session import is_unfinished

HEAD = ["classifier"]
#: Share of the values that PaFi trains, and the ranks at which LoRA in queries and values trains about as many.
BUDGET, RANKS = 0.005, {"full": 6, "quarter": 3}
CALIBRATION = 512


@dataclass(frozen=True)
class Method:
    """How a model is fine-tuned.

    Attributes:
        peft: a method of `finetune`, or None for weights themselves.
        options: its options.
        own_rate: the learning rate at its peak, without a method of `finetune`, which has one by default.
        biases: without a method, whether biases alone train (BitFit).
    """

    peft: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    own_rate: float = 1e-3
    biases: bool = False

    @property
    def rate(self) -> float:
        """The learning rate at its peak."""
        return self.own_rate if self.peft is None else PEFT_RATES[self.peft]


METHODS: dict[str, Method] = {
    "all weights": Method(own_rate=FULL_RATE),
    "bitfit": Method(biases=True),
    "lora": Method("lora", {"target_modules": ["query", "value"]}),
    "pafi global": Method("pafi", {"budget": BUDGET}),
    "pafi matrix": Method("pafi", {"budget": BUDGET, "ranking": "matrix"}),
    "pafi global, indices by rule": Method("pafi", {"budget": BUDGET, "save_indices": False}),
    "hiwi bias": Method("hiwi", {"parameters": "bias", "r": 4}),
    "hiwi weight": Method("hiwi", {"parameters": "weight", "r": 4}),
    "mpo": Method("mpo"),
    **{f"mpo length={length}": Method("mpo", {"length": length}) for length in (3, 7)},
    "mpo layers": Method("mpo", {"embeddings": False}),
    **{f"mpo layers bonds={bonds}": Method("mpo", {"embeddings": False, "bonds": bonds}) for bonds in (128, 64, 32)},
    **{
        f"{name} d={d}": Method("said", {"d": d, "structure_aware": name == "said"})
        for name in ("did", "said")
        for d in (200, 1000, 5000)
    },
}
#: The projections of MiniLM, for methods that know no others.
_MATRICES = ["query", "key", "value", "dense"]
STEPS: dict[str, Callable[[Any], Any]] = {
    "bitfit": lambda model: biases_alone(model),
    "pafi matrix": lambda model: get_peft_model(
        model, make_config("pafi", {"budget": BUDGET, "ranking": "matrix", "biases": False, "norms": False})
    ),
    "pafi global": lambda model: get_peft_model(model, make_config("pafi", {"budget": BUDGET})),
    "supertuning": lambda model: get_peft_model(
        model, SupertuningConfig(target_modules=_MATRICES, sparsity=1 - BUDGET, select_top=False)
    ),
    "hiwi bias": lambda model: get_peft_model(model, make_config("hiwi", {"r": 4})),
    "hiwi weight": lambda model: get_peft_model(model, make_config("hiwi", {"r": 4, "parameters": "weight"})),
    "peanut": lambda model: get_peft_model(model, PeanutConfig(r=4, target_modules=ffn_projections(model))),
    "all weights": lambda model: model,
}
BASES = ("full", "quarter")


def all_rows() -> list[str]:
    """Names of the rows, as `--rows` chooses among them."""
    return [f"step {name}" for name in STEPS] + [f"{base} {name}" for base in BASES for name in METHODS]


def classifier(folder: Path, seed: int) -> Any:
    transformers.set_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(
        folder, id2label={0: "0", 1: "1"}, label2id={"0": 0, "1": 1}
    )


def biases_alone(model: Any) -> Any:
    """The model, of which only biases and the head train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias") or name.startswith(tuple(HEAD)))
    return model


def trained(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def stored_bytes(model: Any) -> dict[str, int]:
    """Bytes of what has to be kept of a model to have it again beside its base."""
    if not hasattr(model, "peft_config"):
        return {"stored": sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        found = {"stored": _size(Path(folder))}
        if model.peft_config["default"].peft_type == "HIWI":
            mlp_fusion.save_merged_delta(model, Path(folder) / "delta")
            found["stored_merged"] = _size(Path(folder) / "delta")
    return found


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def step_row(name: str, folder: Path, steps: int) -> dict[str, Any]:
    """Time and memory of training steps."""
    model = STEPS[name](classifier(folder, 0)).train()
    length = min(128, model.config.max_position_embeddings)
    ids = torch.randint(1000, model.config.vocab_size, (32, length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    peak, seconds = peak_bytes(step), []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    found = {"trained": trained(model), "peak_bytes": peak, "seconds_per_step": statistics.median(seconds)}
    return {**found, "steps": steps, **stored_bytes(model)}


def task_row(base: str, name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One fine-tuning on SST-2."""
    method, folder = METHODS[name], options.model or model_folder()
    rate = options.rate or method.rate
    asked = {**method.options, **({"r": RANKS[base], "lora_alpha": 2 * RANKS[base]} if name == "lora" else {})}
    model = classifier(folder, seed)
    train = first_rows(options.data / "sst2_train.tsv", options.examples)
    if base == "quarter":
        text = [row["text"] for row in train[:CALIBRATION]]
        mlp_fusion.fuse(model, options.width, method="fusion", calibration=text, seed=seed)
    if method.biases:
        biases_alone(model)
    attached = model
    if method.peft is not None:
        config = make_config(method.peft, {**asked, "modules_to_save": HEAD})
        other = classifier(folder, seed)
        if base == "quarter":
            mlp_fusion.fuse(other, options.width, method="fusion", calibration=text, seed=seed)
        attached = get_peft_model(other, config)
    kept = {"trained": trained(attached), **stored_bytes(attached)}
    out = options.work / f"{base} {name} {seed} {options.examples} {options.epochs:g} {rate}".replace(" ", "_")
    goes_on = is_unfinished(out)
    if not goes_on:
        shutil.rmtree(out, ignore_errors=True)
    times: list[float] = []
    report = mlp_fusion.finetune(
        model, out, train, first_rows(options.data / "sst2_dev.tsv", None), task="classification", seed=seed,
        tokenizer=AutoTokenizer.from_pretrained(folder), resume=goes_on, learning_rate=rate,
        epochs=options.epochs, peft=method.peft, peft_options=asked or None,
        progress=lambda *_: times.append(time.perf_counter()),
    )  # fmt: skip
    shutil.rmtree(out)
    assert report.final is not None
    between = [later - earlier for earlier, later in itertools.pairwise(times)]
    return {
        **kept, "accuracy": report.final["accuracy"], "loss": report.final["loss"],
        "evaluations": [[e["step"], e["accuracy"]] for e in report.evaluations], "learning_rate": rate,
        "examples": report.examples, "epochs": options.epochs, "options": asked,
        "seconds_per_step": statistics.median(between) if between else None,
    }  # fmt: skip


def first_rows(file: Path, count: int | None) -> list[dict[str, Any]]:
    rows = read_rows(file, labelled=True)
    texts = [{"text": t, "label": label} for t, label in zip(rows.texts, rows.labels, strict=True)]
    return texts[:count]


def recorded(file: Path) -> list[dict[str, Any]]:
    """The rows in `file`; none if there is no such file yet."""
    if not file.is_file():
        return []
    found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return found


def record(file: Path, row: dict[str, Any]) -> None:
    """Add a row to `file`, a line each."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [*recorded(file), row]
    partial = file.with_suffix(".partial")
    partial.write_text('{"rows": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]}\n", encoding="utf-8")
    partial.replace(file)


def summary(rows: Sequence[dict[str, Any]]) -> None:
    """Print a line a row, means over seeds."""
    together: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row.get(name) for name in ("row", "examples", "epochs", "learning_rate"))
        together.setdefault(key, []).append(row)
    for (name, examples, epochs, rate), found in together.items():
        first, step = found[0], statistics.mean(row["seconds_per_step"] or 0.0 for row in found)
        kept = f"{first['trained']:>10,} trained, {first['stored']:>10,} bytes"
        kept += f" ({first['stored_merged']:,} merged)" if "stored_merged" in first else ""
        if examples is None:
            print(f"{name:36} {kept}, {step:.3f} s a step, {(first['peak_bytes'] or 0) / 2**20:,.0f} MiB")
            continue
        accuracies = [row["accuracy"] for row in found]
        spread = f"{min(accuracies):.4f} to {max(accuracies):.4f}, {len(found)} seeds"
        asked = f"{examples:,} examples, {epochs:g} epochs, rate {rate}"
        print(f"{name:36} {kept}, {step:.3f} s a step: {statistics.mean(accuracies):.4f} ({spread}, {asked})")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the rows that are asked for, or print what there is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with sst2_train.tsv and sst2_dev.tsv")
    parser.add_argument("--rows", default="*", help="which rows, as a pattern")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, help="train on the first so many rows; all of them by default")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--rate", type=float, help="learning rate, in place of each method's own")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed")
    parser.add_argument("--width", type=float, default=0.25, help="of the fused FFNs, as a share")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", type=Path, help="folder of another model of BERT's shape")
    parser.add_argument("--work", type=Path, default=Path("build/companions"))
    parser.add_argument("--out", type=Path, default=Path("build/companions.json"))
    parser.add_argument("--list", action="store_true", help="print the rows, and run nothing")
    parser.add_argument("--summary", action="store_true", help="print the results there are, and run nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    chosen = [name for name in all_rows() if fnmatch.fnmatch(name, options.rows)]
    if options.list or options.summary:
        print("\n".join(chosen)) if options.list else summary(recorded(options.out))
        return
    if options.data is None and any(not name.startswith("step ") for name in chosen):
        parser.error("--data FOLDER is needed")
    for seed in range(options.seeds):
        for name in chosen:
            run_row(name, seed, options)


def run_row(name: str, seed: int, options: argparse.Namespace) -> None:
    """Run a row and write it down, unless that has been done."""
    base, _, method = name.partition(" ")
    key: dict[str, Any] = {"row": name, "seed": seed, "asked": None}
    if base != "step":
        rate = options.rate or METHODS[method].rate
        key |= {"asked": options.examples, "epochs": options.epochs, "learning_rate": rate}
    if (base == "step" and seed) or any(all(row.get(k) == v for k, v in key.items()) for row in recorded(options.out)):
        return
    if base == "step":
        found = step_row(method, options.model or model_folder(), options.steps)
    else:
        found = task_row(base, method, seed, options)
    machine = {"machine": platform.machine(), "threads": options.threads, "torch": torch.__version__}
    record(options.out, {**key, **found, **machine})
    summary(recorded(options.out)[-1:])


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    main()
