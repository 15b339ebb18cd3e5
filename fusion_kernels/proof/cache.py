"""The file in which all processes of a user keep what was found out about a device: verdicts and measurements.

`~/.cache/mlp-fusion/gpu/<key>.json`, or below `MLP_FUSION_CACHE`, where the key stands for everything in `key.py`. A
file is replaced as a whole, by who holds the lock beside it. One that cannot be read, or that is about something else,
is not believed: it counts as empty, and is written anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fusion_kernels.proof.key import key_of

VARIABLE = "MLP_FUSION_CACHE"
FORMAT = 1
SECTIONS = ("proofs", "measured")


class CacheUnusableError(RuntimeError):
    """The file cannot be written; the message says why."""


class NoTurnError(RuntimeError):
    """Another process has not let go of the file in time."""


def folder() -> Path:
    """Where the files are."""
    chosen = os.environ.get(VARIABLE)
    return (Path(chosen) if chosen else Path.home() / ".cache" / "mlp-fusion") / "gpu"


def forget() -> list[Path]:
    """Remove all files; returns which."""
    found = sorted(folder().glob("*.json"))
    for path in found:
        path.unlink(missing_ok=True)
    return found


class Cache:
    """The file about one device."""

    def __init__(self, about: dict[str, str]) -> None:
        """
        Args:
            about: everything that a verdict depends on, by name.
        """
        self.about, self.key = about, key_of(about)
        self.path = folder() / f"{self.key}.json"

    def section(self, name: str) -> dict[str, Any]:
        """What is kept under that name; empty, with a warning, where the file is not to be believed."""
        content, fault = self._read()
        if fault is not None:
            warnings.warn(f"{self.path}: {fault}: it is not believed, and written anew", RuntimeWarning, stacklevel=2)
        found: dict[str, Any] = content[name]
        return found

    def state(self) -> str:
        """In one line what is there."""
        content, fault = self._read()
        if fault is not None:
            return f"not believed: {fault}"
        if not self.path.exists():
            return "not there yet"
        return ", ".join(f"{len(content[name])} {name}" for name in SECTIONS)

    @contextlib.contextmanager
    def turn(self, patience: float) -> Iterator[None]:
        """Let no other process write, or find out what is to be written; who has the turn has it at once.

        Raises:
            NoTurnError: another one has done so for `patience` seconds.
            CacheUnusableError: there is no place for files.
        """
        # One for all of a thread: kernels that are measured may find others that have not been proved.
        lock = FileLock(f"{self.path}.lock", is_singleton=True)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=patience)
        except Timeout:
            raise NoTurnError(f"another process has been checking for {patience:.0f} s ({self.path}.lock)") from None
        except (OSError, NotImplementedError) as error:
            raise CacheUnusableError(f"{self.path.parent} cannot be written: {error} ({VARIABLE} says where)") from None
        try:
            yield
        finally:
            lock.release()

    def put(self, section: str, name: str, entry: Any) -> None:
        """Keep an entry; by who has the turn.

        Raises:
            CacheUnusableError: the file cannot be written.
        """
        content, _ = self._read()
        content[section][name] = entry
        new = self.path.with_suffix(f".{os.getpid()}.new")
        whole = {"format": FORMAT, "about": self.about, **content}
        try:
            new.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
            new.replace(self.path)
        except OSError as error:
            new.unlink(missing_ok=True)
            raise CacheUnusableError(f"{self.path} cannot be written: {error}") from None

    def _read(self) -> tuple[dict[str, dict[str, Any]], str | None]:
        """The sections, and what is wrong with the file; then they are empty."""
        nothing: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
        try:
            whole = json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return nothing, None
        except (OSError, ValueError) as error:
            return nothing, f"cannot be read ({' '.join(str(error).split())})"
        if not isinstance(whole, dict) or whole.get("format") != FORMAT:
            return nothing, "is of another version"
        if whole.get("about") != self.about:
            return nothing, "is about another machine or other kernels"
        if not all(isinstance(whole.get(name), dict) for name in SECTIONS):
            return nothing, "is incomplete"
        return {name: whole[name] for name in SECTIONS}, None
