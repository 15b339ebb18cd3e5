"""What the benchmarks share: how far work raises the memory of the process, and files that are not in memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mlp_fusion.store.tensors import forget as let_go


def peak_bytes(work: Callable[[], Any]) -> int | None:
    """How far `work` raises the resident memory of the process, where Linux tells."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what is needed now
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _resident("VmRSS")
        work()
        return _resident("VmHWM") - before
    except (OSError, AttributeError):
        return None


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def forget(files: Iterable[Path]) -> None:
    """Let files be read from the disk again."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        let_go(descriptor)
        os.close(descriptor)
