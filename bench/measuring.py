"""What the benchmarks share: how far work raises the memory of the process, and files that are not in memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fusion_kernels import native
from mlp_fusion.store.tensors import forget as let_go


def peak_bytes(work: Callable[[], Any]) -> int | None:
    """How far `work`, which is done in any case, raises the resident memory of the process; None but on Linux."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what is needed now
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _resident("VmRSS")
    except (OSError, AttributeError):
        work()
        return None
    work()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def forget(files: Iterable[Path]) -> None:
    """Let files be read from the disk again."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        let_go(descriptor)
        os.close(descriptor)


@contextlib.contextmanager
def steps_timed(names: Iterable[str], clock: Callable[[], float]) -> Iterator[dict[str, float]]:
    """Seconds by `clock` that all threads together spend in operators of the compiled library.

    Args:
        names: of operators; those that this version has not are left out.
        clock: such as `time.thread_time`.
    """
    seconds: dict[str, float] = {}
    lock, kept, ops = threading.Lock(), native.operators, native.operators()

    def timed(name: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            started = clock()
            result = getattr(ops, name)(*args)
            with lock:
                seconds[name] = seconds.get(name, 0.0) + clock() - started
            return result

        return run

    timed_ones = {name: staticmethod(timed(name)) for name in names if hasattr(ops, name)}
    steps = type("Steps", (), {"__getattr__": lambda _, name: getattr(ops, name), **timed_ones})()
    native.operators = lambda: steps
    try:
        yield seconds
    finally:
        native.operators = kept
