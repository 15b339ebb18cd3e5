"""A real model before and after: what it makes of sentences, at a quarter of its FFNs' width.

    python examples/demo.py MODEL OUT

`MODEL` is the folder of a model of sentence embeddings; `make demo` passes all-MiniLM-L6-v2. The commands are those
that one would type. `OUT/calibrated` is the model that learnt from 32 of the package's sentences, `OUT/without-data`
the one that had no text at all, and both files of sentences lie in `OUT`. In the end the three models are compared on
sentences that none of the commands has learnt from: the other 32 are searched with sentences of this script's own.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

#: What is looked for among the 32 sentences.
QUERIES = (
    "The movie was boring and far too long.",
    "The film made me cry in a good way.",
    "A doctor let the sick man go home.",
    "They met a man who fed the birds.",
    "The weather will be wet today.",
    "There was no electricity during the football game.",
)
#: Two that mean the same, two that do not.
PAIRS = (
    ("He plays the violin every evening.", "Every night he practises his instrument."),
    ("He plays the violin every evening.", "The share price fell sharply."),
    ("The movie was boring and far too long.", "A dull film that never seems to end."),
    ("The movie was boring and far too long.", "She baked two loaves of bread."),
)
COLUMNS = ("original", "calibrated", "without data")


class Embedder:
    """A checkpoint that embeds sentences, loaded as any program loads it: by transformers alone."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModel.from_pretrained(folder).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def __call__(self, sentences: list[str]) -> Tensor:
        """`(sentences, hidden)`: means of the last hidden states over tokens, of length 1."""
        batch = self.tokenizer(sentences, padding=True, return_tensors="pt")
        mask = batch["attention_mask"].unsqueeze(-1)
        pooled = (self.model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(pooled, dim=-1)


def split_sentences(folder: Path) -> tuple[Path, Path, list[str]]:
    """Write every other one of the package's sentences into one file, the rest into another, which is also returned."""
    text = (resources.files("mlp_fusion") / "data" / "sentences.txt").read_text(encoding="utf-8")
    sentences = text.splitlines()
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "learn.txt", folder / "measure.txt"
    for n, file in enumerate(files):
        file.write_text("".join(f"{sentence}\n" for sentence in sentences[n::2]), encoding="utf-8")
    return *files, sentences[1::2]


def run(console: Console, *arguments: str) -> float:
    """Run `mlp-fusion` as one types it and return its seconds; a command that fails ends the demo."""
    console.print(f"\n[bold]$ {shlex.join(['mlp-fusion', *arguments])}[/bold]", highlight=False, soft_wrap=True)
    started = time.perf_counter()
    done = subprocess.run([str(Path(sys.executable).parent / "mlp-fusion"), *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return time.perf_counter() - started


def searched(models: list[Embedder], sentences: list[str]) -> tuple[Table, list[int]]:
    """Which sentence each model finds nearest to each query, and how often each finds the original's."""
    found = [(model(list(QUERIES)) @ model(sentences).T).argmax(1).tolist() for model in models]
    table = Table(box=box.SIMPLE_HEAD, title="Which of 32 sentences is nearest?", title_justify="left", show_lines=True)
    for title in ("asked for", *COLUMNS):
        table.add_column(title, ratio=1)
    for n, query in enumerate(QUERIES):
        theirs = ["✓ the same" if f[n] == found[0][n] else f"✗ {sentences[f[n]]}" for f in found[1:]]
        table.add_row(query, sentences[found[0][n]], *theirs)
    return table, [sum(a == b for a, b in zip(f, found[0], strict=True)) for f in found]


def paired(models: list[Embedder]) -> Table:
    """Cosines of pairs of sentences, by model."""
    ends = [(model([a for a, _ in PAIRS]) * model([b for _, b in PAIRS])).sum(1).tolist() for model in models]
    table = Table(box=box.SIMPLE_HEAD, title="How alike are two sentences? (cosine)", title_justify="left")
    table.add_column("")
    for title in COLUMNS:
        table.add_column(title, justify="right")
    for n, (a, b) in enumerate(PAIRS):
        table.add_row(f"{a}\n{b}", *(f"{cosines[n]:.2f}" for cosines in ends))
    return table


def summed_up(folders: list[Path], agreeing: list[int], seconds: list[float]) -> Table:
    """Size, agreement and cost of each model."""
    reports = [json.loads((f / "mlp_fusion" / "report.json").read_text(encoding="utf-8")) for f in folders[1:]]
    table = Table(box=box.SIMPLE_HEAD, title="In figures", title_justify="left")
    table.add_column("")
    for title in COLUMNS:
        table.add_column(title, justify="right")
    first = reports[0]
    table.add_row("parameters", f"{first['parameters_before']:,}", *(f"{r['parameters_after']:,}" for r in reports))
    sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in folders]
    table.add_row("file of weights", *(f"{size / 2**20:.1f} MiB" for size in sizes))
    neurons = [str(first["rows"][0]["neurons_before"]), *(str(r["rows"][0]["neurons_after"]) for r in reports)]
    table.add_row("neurons of each FFN", *neurons)
    table.add_row("cosine to the original, mean of 32", "1", *(f"{r['embeddings']['mean']:.3f}" for r in reports))
    table.add_row("the smallest of them", "1", *(f"{r['embeddings']['minimum']:.3f}" for r in reports))
    table.add_row("nearest sentence as the original's", *(f"{n} of {len(QUERIES)}" for n in agreeing))
    table.add_row("seconds to compress, start to end", "", *(f"{s:.0f} s" for s in seconds))
    return table


def main() -> None:
    """Run the commands, then compare."""
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/demo.py MODEL OUT")
    model, out = Path(sys.argv[1]), Path(sys.argv[2])
    console = Console()
    if not console.is_terminal:
        console.width = 110
    learn, measure, sentences = split_sentences(out)
    calibrated, plain = out / "calibrated", out / "without-data"
    quarter = ("--width", "0.25", "--text", str(measure))
    run(console, "plan", str(model), "--width", "0.25")
    seconds = [run(console, "compress", str(model), str(calibrated), *quarter, "--calibration", str(learn))]
    run(console, "verify", str(calibrated))
    seconds.append(run(console, "compress", str(model), str(plain), *quarter))
    transformers.utils.logging.disable_progress_bar()
    folders = [model, calibrated, plain]
    models = [Embedder(folder) for folder in folders]
    table, agreeing = searched(models, sentences)
    for part in (table, paired(models), summed_up(folders, agreeing, seconds)):
        console.print()
        console.print(part)
    console.print(
        "\nNothing of this was trained: a fine-tune wins back much of the rest (docs/results/fine-tuning.md).\n"
        "32 sentences are few: with 512 of SST-2 the cosine is 0.91 (docs/guide/calibration.md).",
        highlight=False,
    )


if __name__ == "__main__":
    main()
