"""What the two walks over all model types share: a line of JSON for each type, a time limit, and a summary."""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from mlp_fusion.families.catalogue import model_types


class TooLongError(BaseException):
    """A type took longer than it may; no `except Exception` within stops it."""


def _late(*_: Any) -> None:
    raise TooLongError


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise TooLongError within, after so many seconds."""
    signal.signal(signal.SIGALRM, _late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def recorded(done: Path) -> dict[str, dict[str, Any]]:
    """Lines by type; the last one of a type counts."""
    if not done.is_file():
        return {}
    lines = (json.loads(line) for line in done.read_text(encoding="utf-8").splitlines())
    return {line["type"]: line for line in lines}


def write(out: Path, counts: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    """The summary: one line a type."""
    described = {
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "counts": counts,
    }  # fmt: skip
    rows = ",\n".join(json.dumps(line) for line in sorted(lines, key=lambda line: line["type"]))
    head = json.dumps(described)[:-1]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f'{head}, "types": [\n{rows}\n]}}\n', encoding="utf-8")


def parser(documentation: str | None, seconds: int, out: str) -> argparse.ArgumentParser:
    """The options of a walk."""
    options = argparse.ArgumentParser(description=documentation)
    options.add_argument("--types", help="these only, whether done or not: a,b,c")
    options.add_argument("--limit-seconds", type=int, default=seconds, help="longest time for a type")
    options.add_argument("--out", type=Path, default=Path(out))
    return options


def walk(
    done: Path, wanted: Sequence[str], one_type: Callable[[str], dict[str, Any]], what: str = "status"
) -> list[dict[str, Any]]:
    """Do what is wanted, one line after the other, and return all lines there are by now."""
    torch.set_num_threads(1)
    done.parent.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(wanted, 1):
        line = one_type(name)
        with done.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{number}/{len(wanted)} {name}: {line[what]}, {line['seconds']} s", flush=True)
    return [line for name, line in recorded(done).items() if name in model_types()]
