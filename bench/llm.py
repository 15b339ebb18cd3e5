"""A real language model, SmolLM2-135M-Instruct, with narrower FFNs: this project's methods beside other people's.

    python bench/llm.py --data FOLDER [--rows '0.5 *'] [--seeds 3] [--final]
    python bench/llm.py --summary

All 30 FFNs keep 75, 62.5 or 50 % of their 1,536 neurons, or of their parameters where widths differ by layer. A row is
one method at one width, refitted or not, calibrated at once or one FFN after the other, with one seed, which draws the
32 blocks of calibration text too (`llm_text.py`); `--list` prints their names, and `--rows` chooses among them. Of
each: perplexity on held-out text of several kinds, completions that a person can read, seconds by the wall and of the
processor, and memory. Each runs in a process of its own, and is written down when it is done; what is in `--out` is not
run again.

`--final` measures on other held-out text, and writes another file. Nothing may be chosen by that one.

`--model` is a checkpoint of the Llama shape. Without it, that of `smollm2.py` is taken, and made first where it is
missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from llm_rows import Row, all_rows, shrink
from llm_text import Blocks, calibration_batches, described, held_out_blocks
from measuring import peak_bytes
from smollm2 import OUT as MADE
from smollm2 import write
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlp_fusion.choices import KEEP_WIDTH

#: What the models go on with, word by word the likeliest, and for how many tokens.
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, there was a little girl who",
    "To make a cup of tea, first",
    "ROMEO:\nBut soft, what light through yonder window breaks?\n",
)
NEW_TOKENS = 24


@torch.no_grad()
def perplexities(model: Any, blocks: Blocks) -> dict[str, float]:
    """Of each kind, over all its tokens but the first of each block."""
    model.eval()
    return {
        kind: math.exp(statistics.mean(model(input_ids=b[None], labels=b[None]).loss.item() for b in own))
        for kind, own in blocks.items()
    }


@torch.no_grad()
def completions(model: Any, tokenizer: Any) -> list[str]:
    """What follows each of `PROMPTS`."""
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        written = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)[0]
        found.append(tokenizer.decode(written[ids["input_ids"].shape[1] :]))
    return found


def run(row: Row, folder: Path, data: Path, *, final: bool) -> dict[str, Any]:
    """Everything about one row, in this process."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokenize(text: str) -> Sequence[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    blocks = held_out_blocks(tokenize, data, final=final)
    calibration = calibration_batches(tokenize, data, row.seed)
    found: dict[str, Any] = {
        "name": row.name, "form": row.form, **dataclasses.asdict(row), "threads": torch.get_num_threads(),
    }  # fmt: skip
    if row.recipe is not None:
        widths: list[int] = []
        started = time.perf_counter(), time.process_time()
        added = peak_bytes(lambda: widths.extend(shrink(model, row, calibration)))
        found["seconds"] = {"wall": time.perf_counter() - started[0], "processor": time.process_time() - started[1]}
        found["added_bytes"] = added
        found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found["widths"] = widths
    if row.recipe is None or row.recipe.method not in KEEP_WIDTH:  # those have the factors multiplied out
        found["parameters"] = sum(p.numel() for p in model.parameters())
    found["perplexity"] = perplexities(model, blocks)
    found["completions"] = completions(model, tokenizer)
    return found


def recorded(file: Path) -> list[dict[str, Any]]:
    """The rows in `file`; none if there is no such file yet."""
    return json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []


def record(file: Path, rows: Sequence[dict[str, Any]], model: str, *, final: bool) -> None:
    """Write all rows, one a line, and what they have in common; the file is whole at any time."""
    head = {
        "model": model,
        "held_out": "final" if final else "development",
        "text": described(),
        "prompts": PROMPTS,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "gpu": None},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    lines = [f'"{key}": {json.dumps(value)}' for key, value in head.items()]
    lines.append('"rows": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]")
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    unfinished.replace(file)


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of text: of each form the median over seeds, and in brackets how far seeds are apart."""
    kinds = list(rows[0]["perplexity"])
    lines = [f"{'':44}{''.join(f'{kind:>22}' for kind in kinds)}{'seconds':>10}{'CPU':>8}{'MiB':>8}{'seeds':>7}"]
    for form in dict.fromkeys(row["form"] for row in rows):
        own = [row for row in rows if row["form"] == form]
        cells = [_spread([row["perplexity"][kind] for row in own]) for kind in kinds]
        costs = ["", "", ""]
        if "seconds" in own[0]:
            seconds = [statistics.median(row["seconds"][clock] for row in own) for clock in ("wall", "processor")]
            costs = [*(f"{value:.1f}" for value in seconds), f"{max(row['peak_bytes'] for row in own) / 2**20:.0f}"]
        tail = f"{costs[0]:>10}{costs[1]:>8}{costs[2]:>8}{len(own):>7}"
        lines.append(f"{form:44}{''.join(f'{cell:>22}' for cell in cells)}{tail}")
    return lines


def _spread(values: list[float]) -> str:
    middle = f"{statistics.median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f}-{max(values):.2f})"


def missing(rows: Sequence[Row], pattern: str, done: Sequence[dict[str, Any]]) -> list[Row]:
    """The rows whose names `pattern` matches and that are not done, the full model first."""
    names = {row["name"] for row in done}
    return [row for row in rows if fnmatch.fnmatchcase(row.name, pattern) and row.name not in names]


def in_child(row: Row, options: argparse.Namespace) -> dict[str, Any] | None:
    """What :func:`run` finds in a process of its own; None, and what it said, where that fails."""
    command = [sys.executable, __file__, "--one", row.name, "--data", options.data, "--model", options.model]
    command += ["--seeds", str(options.seeds), *(["--final"] if options.final else [])]
    command += [] if options.threads is None else ["--threads", str(options.threads)]
    finished = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode:
        print(f"{row.name}: failed with {finished.returncode}", file=sys.stderr, flush=True)
        return None
    return json.loads(finished.stdout.splitlines()[-1])


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with the texts of llm_text.py")
    parser.add_argument("--model", type=Path, help=f"checkpoint; without it {MADE}, made where it is missing")
    parser.add_argument("--rows", default="*", metavar="PATTERN", help="of names, as file names are matched")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of each row")
    parser.add_argument("--final", action="store_true", help="measure on other held-out text")
    parser.add_argument("--threads", type=int, help="threads of torch; all it has by itself")
    parser.add_argument("--out", type=Path, help="JSON; build/llm.json, or build/llm-final.json")
    parser.add_argument("--list", action="store_true", help="print the names of rows, and run nothing")
    parser.add_argument("--summary", action="store_true", help="print the results there are, and run nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.data is None and not options.list and not options.summary:
        parser.error("--data FOLDER is needed")
    options.out = options.out or Path("build/llm-final.json" if options.final else "build/llm.json")
    return options


def main() -> None:
    """Run the rows that are missing, each in a process of its own, and print all there are."""
    options, failed = parsed(), []
    rows = all_rows(options.seeds)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.one is not None:
        row = next(row for row in rows if row.name == options.one)
        print(json.dumps(run(row, options.model, options.data, final=options.final)))
        return
    if options.list:
        print("\n".join(row.name for row in missing(rows, options.rows, [])))
        return
    if not options.summary:
        if options.model is None:
            options.model = MADE
            if not (MADE / "config.json").is_file():
                write(MADE)
        for row in missing(rows, options.rows, recorded(options.out)):
            found = in_child(row, options)
            if found is None:
                failed.append(row.name)
                continue
            # Read anew: another process may have added rows.
            record(options.out, [*recorded(options.out), found], options.model.name, final=options.final)
            print("\n".join(table([found])), flush=True)
    if done := recorded(options.out):
        print("\n".join(table(done)))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
