"""What a streamed run has done, so that it can go on where it ended: a line for each task, once it is on the disk."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlp_fusion.errors import InputError
from mlp_fusion.measure import FFNRow
from mlp_fusion.store.output import read_journal
from mlp_fusion.store.shards import flush
from mlp_fusion.streaming.work import Member


def fingerprint(content: Mapping[str, Any]) -> str:
    """A digest of JSON types."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def files_as_they_are(files: Iterable[Path]) -> list[list[Any]]:
    """Names, sizes and times of change of files: another source has others."""
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)]


def left_behind(file: Path) -> tuple[bool, bool]:
    """What the journal of a run that has ended says: whether it replaces a checkpoint, and whether all is written.

    Raises:
        InputError: it is damaged.
    """
    head, lines = read_journal(file)
    try:
        return head["replace"], bool(lines) and "complete" in json.loads(lines[-1])
    except ValueError as error:
        raise InputError(f"{file}: damaged: start again with --force") from error


def widths_left(file: Path) -> dict[int, int]:
    """What FFNs were given of a budget in a run that has ended, by their numbers; nothing in any other run.

    Raises:
        InputError: the journal is damaged.
    """
    head, _ = read_journal(file)
    try:
        return {int(number): int(width) for number, width in head.get("widths", {}).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{file}: damaged: start again with --force") from error


class Journal:
    """The file that says what is done.

    Args:
        file: beside the folder that is written.
        parts: what the run depends on, in words -> its fingerprint.
        replace: whether a checkpoint gives way to what is written.
        widths: see :func:`widths_left`.
    """

    def __init__(
        self, file: Path, parts: Mapping[str, str], *, replace: bool = False, widths: Mapping[int, int] | None = None
    ) -> None:
        self.file, self._widths = file, dict(widths or {})
        self._parts, self._replace = dict(parts), replace
        #: Name of a task that is done -> its rows.
        self.done: dict[str, list[Member]] = {}
        #: Whether everything is written, and only has to get its name.
        self.complete = False

    def begin(self) -> None:
        """Start anew."""
        self.done.clear()
        unfinished = self.file.with_name(f"{self.file.name}.new")
        with unfinished.open("w", encoding="utf-8") as handle:
            handle.write(json.dumps({"parts": self._parts, "replace": self._replace, "widths": self._widths}) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        unfinished.rename(self.file)
        flush([self.file.parent])

    def resume(self) -> None:
        """Read what is done.

        Raises:
            InputError: it is that of another run.
        """
        head, lines = read_journal(self.file)
        changed = [name for name, digest in self._parts.items() if head["parts"].get(name) != digest]
        if changed:
            raise InputError(
                f"{self.file}: the unfinished run had another {changed[0]}: go on with what it was started with, or "
                "start again with --force"
            )
        whole = 0
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                break  # the last one, when the power went
            if entry.get("complete"):
                self.complete = True
            else:
                self.done[entry["task"]] = [(number, FFNRow(**row), seen) for number, row, seen in entry["rows"]]
            whole += 1
        with self.file.open("r+b") as handle:
            handle.truncate(len(handle.readline()) + sum(len(line) + 1 for line in lines[:whole]))

    def add(self, task: str, rows: list[Member]) -> None:
        """Note that a task is done, its bytes on the disk."""
        self._append({"task": task, "rows": [(number, dataclasses.asdict(row), seen) for number, row, seen in rows]})
        self.done[task] = rows

    def close(self) -> None:
        """Note that everything is written."""
        self._append({"complete": True})
        self.complete = True

    def _append(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps(entry)
        with self.file.open("a", encoding="utf-8") as handle:
            handle.write(line + "\n")
            handle.flush()
            os.fsync(handle.fileno())
