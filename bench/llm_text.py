"""The text of `llm.py`: blocks of tokens to calibrate on, to develop on, and to judge on in the end.

Four kinds of text, from `FOLDER`: plays (`tiny_shakespeare.txt`), opinions (`sst2_train.tsv` and `sst2_dev.tsv`,
`sentence<TAB>label`), facts in sentences (`webnlg_dev.json`), and descriptions of restaurants (`e2e_test.txt`,
`table||text`), which nothing is calibrated on. A kind's texts are joined by spaces, and cut into blocks of 512
tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LENGTH = 512
#: Blocks of each kind: drawn by a seed to calibrate on; the first ones held out, to develop on; those behind them, to
#: judge on.
CALIBRATION = {"shakespeare": 16, "sst2": 8, "webnlg": 8}
DEVELOPMENT = {"shakespeare": 8, "sst2": 4, "webnlg": 8}
FINAL = {"shakespeare": 16, "sst2": 16, "webnlg": 16, "e2e": 16}
#: Blocks that the model runs on at a time while it is calibrated.
_BATCH = 4

Blocks = Mapping[str, Tensor]


def learning_text(data: Path) -> dict[str, str]:
    """Kind -> what may be calibrated on: nine tenths of the plays, training sentences, the first half of the facts."""
    plays, facts = _plays(data), _facts(data)
    return {
        "shakespeare": plays[: len(plays) * 9 // 10],
        "sst2": _opinions(data / "sst2_train.tsv"),
        "webnlg": " ".join(facts[: len(facts) // 2]),
    }


def held_out_text(data: Path) -> dict[str, str]:
    """Kind -> what is never calibrated on."""
    plays, facts = _plays(data), _facts(data)
    return {
        "shakespeare": plays[len(plays) * 9 // 10 :],
        "sst2": _opinions(data / "sst2_dev.tsv"),
        "webnlg": " ".join(facts[len(facts) // 2 :]),
        "e2e": " ".join(_behind_bars(line) for line in _lines(data / "e2e_test.txt")),
    }


def calibration_batches(tokenize: Callable[[str], Sequence[int]], data: Path, seed: int) -> list[dict[str, Tensor]]:
    """`CALIBRATION` blocks, drawn by `seed` from all that may be learnt from, as batches of `input_ids (4, 512)`."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for kind, text in learning_text(data).items():
        blocks = _blocks(tokenize(text))
        chosen.append(blocks[torch.randperm(len(blocks), generator=generator)[: CALIBRATION[kind]].sort().values])
    return [{"input_ids": batch} for batch in torch.cat(chosen).split(_BATCH)]


def held_out_blocks(tokenize: Callable[[str], Sequence[int]], data: Path, *, final: bool) -> Blocks:
    """Kind -> `(blocks, 512)` to measure perplexities on; with `final`, others than those of development."""
    found = {}
    for kind, text in held_out_text(data).items():
        blocks, skipped = _blocks(tokenize(text)), DEVELOPMENT.get(kind, 0)
        count = FINAL[kind] if final else skipped
        found[kind] = blocks[skipped : skipped + count] if final else blocks[:count]
        if len(found[kind]) < count:
            raise ValueError(f"{kind} has {len(blocks)} blocks of {LENGTH} tokens, {skipped + count} are wanted")
    return {kind: blocks for kind, blocks in found.items() if len(blocks)}


def described() -> dict[str, Any]:
    """What was calibrated and measured on, for the results' file."""
    return {"tokens_of_a_block": LENGTH, "calibration": CALIBRATION, "development": DEVELOPMENT, "final": FINAL}


def _blocks(tokens: Sequence[int]) -> Tensor:
    ids = torch.tensor(tokens)
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def _plays(data: Path) -> str:
    return (data / "tiny_shakespeare.txt").read_text(encoding="utf-8")


def _opinions(file: Path) -> str:
    return " ".join(line.rpartition("\t")[0] for line in _lines(file))


def _facts(data: Path) -> list[str]:
    entries = json.loads((data / "webnlg_dev.json").read_text(encoding="utf-8"))["entries"]
    return [text["lex"] for entry in entries for fact in entry.values() for text in fact["lexicalisations"]]


def _behind_bars(line: str) -> str:
    return line.partition("||")[2].strip()


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()
