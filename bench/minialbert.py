"""MiniALBERT: what a start from the teacher saves, with and without adapters; and what a pass through the layer costs.

    python bench/minialbert.py --data FOLDER [--rows 'minilm *'] [--steps 0 100 400] [--seeds 3]
    python bench/minialbert.py --rows cost
    python bench/minialbert.py --summary

Rows `TEACHER START [bare] STEPS` distil a student of all-MiniLM-L6-v2 (`minilm`, which has no head for masked tokens
that a student could learn from) or of a small BERT that the script trains first (`small`), on SST-2's training texts
and tiny Shakespeare, for a number of steps. `START` is `random`, as in the paper, or `teacher`; `bare` students have no
adapters. `--rate`, `--mlm-weight`, `--embedding-size`, `--intermediate-size` and `--tuning-rate` make others of them,
which are noted as rows of their own. The loss for masked tokens is measured on SST-2's development texts; then the
student is fine-tuned on `--examples` rows of SST-2. Rows `TEACHER fusion` fine-tune the teacher with its FFNs fused to
`--width` instead, and `small itself` as it is, after its own loss for masked tokens. `cost` times forward and backward
of a pass at the shape of BERT-base, its FFN as transformers' layers and by this project's operator.

Every row is written to `--out` when it is done, and what is there already is not run again.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from companions import classifier, first_rows, record, recorded
from support import model_folder
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, BertConfig

import mlp_fusion
from fusion_kernels import fused_mlp
from mlp_fusion.finetuning.data import Rows
from mlp_fusion.finetuning.masking import MaskedText, masked_blocks

STARTS, ADAPTERS = ("random", "teacher"), ("", " bare")
#: The small teacher, and what it is trained for.
SMALL = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
SMALL_STEPS, SMALL_RATE = 1000, 1e-3
#: Blocks of text, and how many are worked on at a time.
LENGTH, BATCH = 64, 16
#: Options that make a student's row another one.
ASKED = ("rate", "mlm_weight", "embedding_size", "intermediate_size", "tuning_rate")
#: A distillation is evaluated so many times.
PARTS = 4
#: Weights of fine-tuned teachers are trained at this rate.
TEACHER_RATE = 1e-4


@dataclass(frozen=True)
class Teacher:
    """A teacher: its folder, and whether it has a head for masked tokens."""

    folder: Path
    head: bool


def texts(data: Path) -> list[str]:
    """SST-2's training texts and Shakespeare's lines, mixed by a fixed seed."""
    found = [row["text"] for row in first_rows(data / "sst2_train.tsv", None)]
    lines = (data / "tiny_shakespeare.txt").read_text(encoding="utf-8").split("\n\n")
    found += [" ".join(part.split()) for part in lines if part.strip()]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    return [found[n] for n in order]


def small_teacher(options: argparse.Namespace) -> Path:
    """The folder of the small BERT, which is trained on the text where there is none yet."""
    out: Path = options.work / "small"
    if (out / "config.json").is_file():
        return out
    folder = options.model or model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    transformers.set_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=128, pad_token_id=0, **SMALL)
    model: Any = AutoModelForMaskedLM.from_config(config).train()
    known = Rows("text", texts(options.data))
    data = MaskedText(*masked_blocks(known, tokenizer, LENGTH), tokenizer, 0.15, 0, "teacher")
    optimizer = torch.optim.AdamW(model.parameters(), SMALL_RATE)
    steps = options.teacher_steps
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    for step in range(steps):
        model(**data.batch(range(step * BATCH, (step + 1) * BATCH))).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(out / "unfinished")
    tokenizer.save_pretrained(out / "unfinished")
    for file in (out / "unfinished").iterdir():
        file.replace(out / file.name)
    (out / "unfinished").rmdir()
    return out


def teacher_of(name: str, options: argparse.Namespace) -> Teacher:
    return (
        Teacher(options.model or model_folder(), False) if name == "minilm" else Teacher(small_teacher(options), True)
    )


def student_row(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Distil a student and fine-tune it."""
    kind, start, *rest, steps = name.split()
    teacher, out = teacher_of(kind, options), options.work / f"{name} {seed}".replace(" ", "_")
    shutil.rmtree(out, ignore_errors=True)
    known: dict[str, Any] = {
        "start": start, "seed": seed, "embedding_size": options.embedding_size, "max_length": LENGTH,
        "intermediate_size": options.intermediate_size, "mlm_weight": options.mlm_weight,
        **({"adapter_size": 0} if "bare" in rest else {}), **({} if teacher.head else {"output_weight": 0.0}),
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(teacher.folder)
    all_texts = texts(options.data)
    wanted = max(1, int(steps) // PARTS) * BATCH
    blocks = len(masked_blocks(Rows("text", all_texts), tokenizer, LENGTH)[0])
    rows = [{"text": text} for text in all_texts[: max(1, len(all_texts) * wanted // blocks)]]
    began = time.process_time()
    report = mlp_fusion.distill(
        teacher.folder, out, rows, [{"text": row["text"]} for row in first_rows(options.data / "sst2_dev.tsv", None)],
        batch_size=BATCH, learning_rate=options.rate, epochs=PARTS if int(steps) else 1e-6, **known,
    )  # fmt: skip
    found = tuned(out, seed, options.tuning_rate, options)
    final = report.final or {}
    return {
        "parameters": report.parameters, "processor_seconds": time.process_time() - began, **found,
        "mlm": final["mlm"], "loss": final["loss"],
        "curve": [{k: e[k] for k in ("step", "mlm", "loss")} for e in report.evaluations], "options": known,
    }  # fmt: skip


def fusion_row(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Fuse a teacher's FFNs and fine-tune it."""
    teacher = teacher_of(name.split()[0], options)
    model = classifier(teacher.folder, seed)
    calibration = [row["text"] for row in first_rows(options.data / "sst2_train.tsv", 512)]
    if options.width < 1:
        mlp_fusion.fuse(model, options.width, calibration=calibration, seed=seed)
    return {"width": options.width, **tuned(model, seed, TEACHER_RATE, options, teacher.folder)}


def teacher_row(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The small teacher's own loss for masked tokens, and its accuracy."""
    folder = small_teacher(options)
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = Rows("text", [row["text"] for row in first_rows(options.data / "sst2_dev.tsv", None)])
    data = MaskedText(*masked_blocks(rows, tokenizer, LENGTH), tokenizer, 0.15, 0, "teacher")
    total, count = 0.0, 0
    with torch.no_grad():
        for begin in range(0, len(data), BATCH):
            batch = data.batch(range(begin, min(begin + BATCH, len(data))))
            masked = int((batch["labels"] != -100).sum())
            total, count = total + float(model(**batch).loss) * masked, count + masked
    found = tuned(classifier(folder, seed), seed, TEACHER_RATE, options, folder)
    return {**found, "mlm": total / count, "teacher_steps": options.teacher_steps}


def tuned(
    model: Any, seed: int, rate: float, options: argparse.Namespace, tokenizer: Path | None = None
) -> dict[str, Any]:
    """Accuracy on SST-2 after fine-tuning, and the parameters without a head for masked tokens."""
    out = options.work / "tuned"
    shutil.rmtree(out, ignore_errors=True)
    report = mlp_fusion.finetune(
        model, out, first_rows(options.data / "sst2_train.tsv", options.examples),
        first_rows(options.data / "sst2_dev.tsv", None), task="classification", seed=seed, epochs=options.epochs,
        learning_rate=rate, tokenizer=None if tokenizer is None else AutoTokenizer.from_pretrained(tokenizer),
    )  # fmt: skip
    count = AutoModelForSequenceClassification.from_pretrained(out).num_parameters()
    shutil.rmtree(out)
    assert report.final is not None
    return {"accuracy": report.final["accuracy"], "classifier_parameters": count, "examples": report.examples}


def fused_chunk(layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The FFN of a layer by this project's operator."""

    def fused(states: torch.Tensor) -> torch.Tensor:
        return fused_mlp(states, layer.ffn.weight, layer.ffn.bias, layer.ffn_output.weight, layer.ffn_output.bias)

    return fused


def cost_row(repeats: int) -> dict[str, Any]:
    """Seconds of forward and backward of a pass at BERT-base's shape, plain and with the fused operator."""
    transformers.set_seed(0)
    model: Any = mlp_fusion.MiniAlbertModel(mlp_fusion.MiniAlbertConfig(hidden_dropout_prob=0.0))
    layer = model.encoder.layers[0]
    x = torch.randn(8, 128, 768, requires_grad=True)
    ways = {"plain": layer.ff_chunk, "fused": fused_chunk(layer)}

    def timed(chunk: Callable[[torch.Tensor], torch.Tensor]) -> float:
        layer.ff_chunk = chunk
        began = time.perf_counter()
        layer(x, number=1).sum().backward()
        return time.perf_counter() - began

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, chunk in ways.items():
            seconds[name].append(timed(chunk))
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    return {"tokens": 1024, "seconds": medians, "ratio": medians["fused"] / medians["plain"]}


def all_rows(steps: Sequence[int]) -> list[str]:
    """Names of the rows, as `--rows` chooses among them."""
    students = [
        f"{teacher} {start}{bare} {count}"
        for teacher in ("minilm", "small") for count in steps for bare in ADAPTERS for start in STARTS
    ]  # fmt: skip
    return ["cost", *students, "minilm fusion", "small fusion", "small itself"]


def run_row(name: str, seed: int, options: argparse.Namespace) -> None:
    """Run a row and write it down, unless that has been done."""
    key: dict[str, Any] = {"row": name, "seed": seed}
    if "fusion" in name:
        key["asked_width"] = options.width
    elif name not in ("cost", "small itself"):
        key["asked"] = {asked: getattr(options, asked) for asked in ASKED}
    if (name == "cost" and seed) or any(all(row.get(k) == v for k, v in key.items()) for row in recorded(options.out)):
        return
    run = {"cost": lambda: cost_row(options.repeats), "small itself": lambda: teacher_row(seed, options)}.get(
        name, lambda: (fusion_row if "fusion" in name else student_row)(name, seed, options)
    )
    machine = {"machine": platform.machine(), "threads": options.threads, "torch": torch.__version__}
    record(options.out, {**key, **run(), **machine})
    summary(recorded(options.out)[-1:])


def summary(rows: Sequence[dict[str, Any]]) -> None:
    """Print a line a row, means over seeds."""
    for name in dict.fromkeys(map(_kind, rows)):
        found = [row for row in rows if _kind(row) == name]
        if "seconds" in found[0]:
            said = json.dumps(found[0]["seconds"])
        else:
            accuracy = statistics.mean(row["accuracy"] for row in found)
            said = f"{found[0]['classifier_parameters']:>10,} parameters, accuracy {accuracy:.4f}, {len(found)} seeds"
            if "mlm" in found[0]:
                said += f", mlm {statistics.mean(row['mlm'] for row in found):.3f}"
                seconds = [row["processor_seconds"] for row in found if "processor_seconds" in row]
                said += f", {statistics.mean(seconds):.0f} processor seconds" if seconds else ""
        print(f"{name[0]:28} {name[1] or ''} {said}")


def _kind(row: dict[str, Any]) -> tuple[str, str]:
    """What rows have in common that differ by their seed: their name, and what was asked for."""
    asked = row.get("asked", {}).values()
    return row["row"], str(row.get("width", "")) or " ".join(str(value) for value in asked if value is not None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the rows that are asked for, or print what there is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with sst2_train.tsv, sst2_dev.tsv and tiny_shakespeare.txt")
    parser.add_argument("--rows", default="*", help="which rows, as a pattern")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 100, 400], help="steps of distillation")
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate of the distillation")
    parser.add_argument("--mlm-weight", type=float, default=1.0, help="of masked tokens in the distillation")
    parser.add_argument("--embedding-size", type=int, default=128, help="of the students")
    parser.add_argument("--intermediate-size", type=int, help="neurons of the students' FFN; the teacher's by default")
    parser.add_argument("--teacher-steps", type=int, default=SMALL_STEPS, help="steps of the small teacher")
    parser.add_argument("--width", type=float, default=0.25, help="share of the FFNs in rows of fusion; 1: all")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--examples", type=int, help="fine-tune on the first so many rows; all of them by default")
    parser.add_argument("--epochs", type=float, default=1.0, help="of the fine-tuning")
    parser.add_argument("--tuning-rate", type=float, default=3e-4, help="learning rate of students' fine-tuning")
    parser.add_argument("--repeats", type=int, default=7, help="of `cost`")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", type=Path, help="folder of another model of BERT's shape than all-MiniLM-L6-v2")
    parser.add_argument("--work", type=Path, default=Path("build/minialbert"))
    parser.add_argument("--out", type=Path, default=Path("build/minialbert.json"))
    parser.add_argument("--list", action="store_true", help="print the rows, and run nothing")
    parser.add_argument("--summary", action="store_true", help="print the results there are, and run nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    chosen = [name for name in all_rows(options.steps) if fnmatch.fnmatch(name, options.rows)]
    if options.list or options.summary:
        print("\n".join(chosen)) if options.list else summary(recorded(options.out))
        return
    if options.data is None and chosen != ["cost"]:
        parser.error("--data FOLDER is needed")
    for seed in range(options.seeds):
        for name in chosen:
            run_row(name, seed, options)


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    main()
