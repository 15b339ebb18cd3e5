"""The proofs of bench/gpu.py: every case that kernels prove themselves with, each by itself, and what users get.

Of a case it is kept how large the errors are as shares of their bounds, and whether its bits are the same twice. The
float64 results to compare with come from the references on the CPU, in the process that runs the case. A verdict is
what the first `auto` call of a user waits for: all cases of a backend in a process of their own.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from typing import Any

import gpu_timing
import torch
from gpu_running import Told, Work

from fusion_kernels import library
from fusion_kernels.proof import Proof, indexed
from fusion_kernels.proof.cases import Case, failure, noting

#: Seconds below which no verdict is asked for: a cold start of Python and torch takes some of them. And those that one
#: may take, which are fewer than a line of this stage has: it would be ended without having said why.
LEAST_SECONDS, MOST_SECONDS = 20.0, 40.0


def lines(told: Told) -> Iterator[tuple[str, Work]]:
    """Cases, then verdicts."""
    for name, case in cases():
        yield f"{name}: {case.name}", functools.partial(_judged, case)
    for name, proof in library.proofs(torch.device(gpu_timing.DEVICE)).items():
        assert isinstance(proof, Proof)
        yield f"verdict: {name}", functools.partial(_verdict, proof, told)


def cases() -> Iterator[tuple[str, Case]]:
    """The cases of every proof that can run on the device, with the proof's name."""
    device = indexed(torch.device(gpu_timing.DEVICE))
    for name, proof in library.proofs(device).items():
        assert isinstance(proof, Proof)
        module, _, function = proof.cases.partition(":")
        for case in getattr(importlib.import_module(module), function)(device):
            yield name, case


def _judged(case: Case) -> dict[str, Any]:
    with noting() as shares:
        reason = failure(case)
    found: dict[str, Any] = {"errors over bounds": shares, "equal bits twice": reason is None}
    if reason is not None:
        # Bits are compared last, where nothing else is wrong.
        same = False if "other bits" in reason else None
        return {**found, "equal bits twice": same, "failed": reason, "brief": f"FAILED: {reason}"}
    return {**found, "brief": f"holds, {max(shares.values(), default=0.0):.2g} of its bounds"}


def _verdict(proof: Proof, told: Told) -> dict[str, Any]:
    left = told.left()
    if left < LEAST_SECONDS:
        reason = f"not reached: {max(0.0, left):.0f} s are left, and a verdict may need {LEAST_SECONDS:.0f}"
        return {"skipped": reason, "brief": reason}
    verdict = proof.check(torch.device(gpu_timing.DEVICE), limit=min(left, MOST_SECONDS))
    found = {"verdict": verdict.text, "cases": verdict.cases, "seconds of the process": verdict.seconds}
    return found if verdict.why is None else {**found, "failed": verdict.text}
