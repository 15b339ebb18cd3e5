"""What is compiled before anything is timed, for bench/gpu.py: by as many processes as there are processors.

    python bench/gpu_compile.py 3 16 [STAGE ...]

makes every 16th of all calls, from the third on: one call of each case of the proofs and of each shape that is timed,
or of those that the named stages make.
So the caches of Triton and Inductor hold what the stages after this one launch, compiled for the device at hand, and a
call that fails or crashes takes away no other process. Beside them the compiled libraries are built in the checkout.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu_running import ROOT, Told, Work, environment

#: The modules whose calls are made, the longest first, as they are dealt out; and the stages that make the same calls.
MODULES = {
    "gpu_kmeans": ("kmeans", "profile", "ncu"),
    "gpu_mlp": ("mlp", "profile", "ncu"),
    "gpu_experts": ("experts",),
    "gpu_ntk": ("ntk",),
    "gpu_whole": ("whole",),
}
#: The stages that run the cases of proofs: two of them where there is no verdict yet.
PROVING = ("proofs", "sanitizer", "mlp", "whole")
#: What the build leaves in `fusion_kernels`, without what stands behind the first dot.
LIBRARIES = ("_C", "_cuda")
#: Seconds before the end of the share, in which what was said is still read.
MARGIN = 3.0


def lines(told: Told) -> Iterator[tuple[str, Work]]:
    """Everything at once, in one line for the kernels and one for the libraries."""
    # `auto` builds the library of the CPU even where that of CUDA cannot be.
    mode = os.environ.get("MLP_FUSION_BUILD", "auto")
    building = started(["setup.py", "build_ext", "--inplace"], MLP_FUSION_BUILD=mode)
    yield "launches", functools.partial(all_compiled, told)
    yield "libraries", functools.partial(built, building, told)


# --- processes -------------------------------------------------------------------------------------------------------


class Running:
    """A process of this stage and what it says, in a file."""

    def __init__(self, arguments: list[str], changes: dict[str, str]) -> None:
        self.said = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment() | changes, stdin=subprocess.DEVNULL,
            stdout=self.said, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def ended(self, seconds: float) -> tuple[int | None, str]:
        """Its status, None where it had to be ended after so many seconds, and all that it said."""
        try:
            status: int | None = self.process.wait(timeout=max(0.1, seconds))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            status = None
        self.said.seek(0)
        return status, self.said.read().decode(errors="replace")


def started(arguments: list[str], **changes: str) -> Running:
    """Start Python with these arguments."""
    return Running(arguments, changes)


def all_compiled(told: Told) -> dict[str, Any]:
    """How many kernels were compiled, in how many seconds, by family; calls that failed, and processes that ended."""
    count = len(os.sched_getaffinity(0))
    # Processors are busy as it is: Inductor need not start processes of its own.
    alone = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    stages = told.options.get("stages", [])
    workers = [started([str(Path(__file__)), str(number), str(count), *stages], **alone) for number in range(count)]
    families: dict[str, dict[str, float]] = {}
    failures: dict[str, str] = {}
    calls = 0
    for number, worker in enumerate(workers):
        status, said = worker.ended(told.left() - MARGIN)
        messages = [json.loads(line) for line in said.splitlines() if line.startswith('{"call"')]
        for message in messages:
            calls += "seconds" in message
            if message.get("failure"):
                failures[message["call"]] = message["failure"]
            family = families.setdefault(message["call"].split(" ")[0], {"kernels": 0, "compile seconds": 0.0})
            family["kernels"] += message.get("kernels", 0)
            family["compile seconds"] += message.get("compile seconds", 0.0)
        if status != 0:
            last = messages[-1]["call"] if messages else "the preparation"
            why = "did not end in time" if status is None else f"status {status}: {said.strip()[-300:]}"
            failures[f"process {number}, at {last}"] = why
    found: dict[str, Any] = {
        "processes": count, "calls": calls, "families": families, "failures": failures,
        "brief": f"{sum(f['kernels'] for f in families.values()):.0f} kernels, {calls} calls, {len(failures)} failures",
    }  # fmt: skip
    return {**found, "failed": "; ".join(f"{k}: {v}"[:300] for k, v in failures.items())} if failures else found


def built(building: Running, told: Told) -> dict[str, Any]:
    """How the libraries were built; without them there are no tangent kernels by CUDA and no times of the CPU."""
    status, said = building.ended(told.left() - MARGIN)
    there = sorted(path.name for path in (ROOT / "fusion_kernels").glob("*.so"))
    found: dict[str, Any] = {"status": status, "libraries": there}
    missing = [name for name in LIBRARIES if not any(library.startswith(f"{name}.") for library in there)]
    if status != 0 or missing:
        why = "did not end in time" if status is None else f"ended with status {status}"
        said = " | ".join(said.strip().splitlines()[-6:])[-1500:]
        return {**found, "failed": f"the build {why}; missing: {', '.join(missing) or 'nothing'}: {said}"}
    return {**found, "brief": f"{', '.join(there)} in {time.monotonic() - building.began:.0f} s"}


# --- one process of many ---------------------------------------------------------------------------------------------


def calls(stages: Sequence[str] = ()) -> dict[str, Callable[[], object]]:
    """What the stages launch later, by name; the first word is the family. Everything if none is named but this one."""
    import gpu_proofs

    wanted = set(stages) - {"compile"} or {*PROVING, *(stage for makers in MODULES.values() for stage in makers)}
    found: dict[str, Callable[[], object]] = {}
    for module, makers in MODULES.items():
        if wanted & {*makers}:
            found |= importlib.import_module(module).jobs()
    for name, case in gpu_proofs.cases() if wanted & {*PROVING} else ():
        if not name.endswith(" triton"):
            continue  # built with the library
        found[f"{name.split(' ')[0]}-proof {case.name}"] = case.run
    return found


def make(number: int, of: int, stages: Sequence[str]) -> None:
    """Make every `of`-th call, and say what was compiled for it."""
    from triton import knobs

    compiled: list[float] = []

    def listen(*, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            compiled.append(times.total / 1e6)

    knobs.compilation.listener = listen
    for name, call in [*calls(stages).items()][number::of]:
        say(call=name)
        compiled.clear()
        began, failure = time.monotonic(), None
        try:
            call()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what the call comes to
            failure = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        seconds = {"seconds": time.monotonic() - began, "compile seconds": sum(compiled)}
        say(call=name, kernels=len(compiled), failure=failure, **seconds)


def say(**message: Any) -> None:
    """One line of JSON; `call` comes first."""
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    make(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
