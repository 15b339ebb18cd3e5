"""Bars on standard error, for people who wait."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any


def progress_bar(unit: str = "", *, silent: bool = False) -> Any:
    """A bar on standard error, which shows the description of its task."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn(), TimeRemainingColumn())
    # On a pipe, a bar that is drawn once at the end is a blank line in front of the error.
    hidden = silent or sys.stderr is None or not sys.stderr.isatty()
    description = TextColumn("{task.description}")
    return Progress(description, *columns, console=Console(stderr=True), transient=True, disable=hidden)


@contextlib.contextmanager
def step_bar(*, silent: bool = False) -> Iterator[Callable[[str, int, int, float | None], None]]:
    """What shows the stage, the steps and the loss of a training in a bar."""
    with progress_bar("steps", silent=silent) as bar:
        task = bar.add_task("preparing", total=None)

        def show(stage: str, done: int, total: int, loss: float | None) -> None:
            words = stage if loss is None else f"{stage}, loss {loss:.4f}"
            bar.update(task, description=words, completed=done, total=total)

        yield show
