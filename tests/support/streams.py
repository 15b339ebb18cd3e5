"""Streamed runs that are stopped, and what they write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def files(folder: Path) -> dict[str, bytes]:
    """What a checkpoint consists of, but for the times that a report holds."""
    timed = ("report.json", "README.md")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in timed
    }


class StoppedError(Exception):
    """A run was stopped on purpose."""


def stop_after(tasks_done: int) -> Callable[[int, int], None]:
    """A progress that stops the run after so many tasks."""
    seen = []

    def progress(done: int, _total: int) -> None:
        seen.append(done)
        if len(seen) == tasks_done:
            raise StoppedError

    return progress
