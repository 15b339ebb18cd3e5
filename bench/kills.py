"""Streamed runs killed again and again: each goes on, and what is written in the end is what an unhindered run writes.

`python bench/kills.py [--kills 50]`. A process is killed (SIGKILL) in front of, or behind, one of the calls that make
something last: a write to a shard, a flush, a rename, a removal. Which one is drawn anew each time, so that kills fall
between renaming and noting as well. When a run has come to its end, its files are compared with those of a run that
nothing has hindered, and the next one begins.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from mlp_fusion.streaming import tasks
from mlp_fusion.verbs.compress import compress
from mlp_fusion.verbs.plan import plan

RESULTS = Path("bench/results/kills-cpu.json")
#: Calls of `os` that are counted.
LASTING = ("fsync", "pwrite", "rename", "unlink", "mkdir")
_TASK_BYTES = 300_000
_CONFIG: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 97,
    "intermediate_size": 128, "num_local_experts": 8, "num_experts_per_tok": 2, "pad_token_id": 1,
}  # fmt: skip


def main() -> None:
    """Kill, compare, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    tasks.TASK_BYTES = _TASK_BYTES
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="kills_") as folder:
        counts = run(Path(folder), asked.kills, random.Random(asked.seed))
    print(json.dumps(counts))
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    asked.out.write_text(json.dumps({**versions, **counts}, indent=1) + "\n", encoding="utf-8")
    if counts["different"]:
        raise SystemExit(1)


def run(folder: Path, kills: int, chance: random.Random) -> dict[str, Any]:
    """Kill runs until there have been so many kills.

    Args:
        folder: to work in.
        kills: how many.
        chance: draws them.
    """
    source, out = folder / "source", folder / "out"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.MixtralConfig(**_CONFIG))
    model.to(torch.bfloat16).save_pretrained(source, max_shard_size="300KB")
    plan(source, 0.5)  # what children share
    whole = folder / "whole"
    calls = in_child(source, whole, None)
    done: dict[str, Any] = {"kills": 0, "runs": 0, "calls": calls, "different": 0, "killed at": []}
    while done["kills"] < kills:
        at = chance.randrange(2 * calls)
        if in_child(source, out, at) is None:
            done["kills"] += 1
            done["killed at"].append(at / 2)
            if not out.exists() or (folder / ".out.journal").exists():
                continue
            # Behind its very last call: there is nothing to go on with.
        done["runs"] += 1
        done["different"] += contents(out) != contents(whole)
        shutil.rmtree(out)
    in_child(source, out, None)
    done["runs"] += 1
    done["different"] += contents(out) != contents(whole)
    return done


def in_child(source: Path, out: Path, at: int | None) -> int | None:
    """Compress in a process of its own; the number of lasting calls, or None if it was killed.

    Args:
        source, out: checkpoints.
        at: twice the number of the call in front of which it is killed, one more for behind it; None for not at all.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_compress, args=(source, out, at, sender))
    child.start()
    sender.close()
    try:
        found: int | None = receiver.recv()
    except EOFError:
        found = None
    child.join()
    if found is None and child.exitcode != -signal.SIGKILL:
        raise RuntimeError(f"the run ended with {child.exitcode} instead of being killed")
    return found


def _compress(source: Path, out: Path, at: int | None, sender: Any) -> None:
    counter = _Counter(at)
    for name in LASTING:
        setattr(os, name, counter.watched(getattr(os, name)))
    compress(source, out, 0.5, stream=True, resume=True)
    sender.send(counter.seen)


class _Counter:
    """Counts calls, and kills this process at one of them."""

    def __init__(self, at: int | None) -> None:
        self.at, self.seen = at, 0

    def watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._perhaps(2 * self.seen)
            result = function(*args, **kwargs)
            self._perhaps(2 * self.seen + 1)
            self.seen += 1
            return result

        return call

    def _perhaps(self, place: int) -> None:
        if place == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a checkpoint but those that hold times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("report.json", "README.md")
    }


if __name__ == "__main__":
    main()
