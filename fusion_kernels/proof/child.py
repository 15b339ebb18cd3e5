"""The process in which the cases of a proof run, and the one that waits for it.

A kernel that writes where it may not leaves its process without a working device, and one that never ends cannot be
stopped from inside. So cases run in a process of their own, whose memory is its own too. It sees the devices that its
parent sees, says which one it has found, and then what becomes of each case before the next begins.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from typing import Any

import torch

from fusion_kernels.proof.cases import failure
from fusion_kernels.proof.key import facts, key_of
from fusion_kernels.proof.verdict import FAILED, PROVED, UNKNOWN, Verdict

#: What a device's memory or an exclusive mode may refuse: nothing that speaks against the kernels.
_PASSING = ("out of memory", "busy or unavailable", "all CUDA-capable devices are busy")
_START = "import sys; sys.path[:] = {path!r}; from fusion_kernels.proof.child import main; main({arguments!r})"


def ask(cases: str, device: torch.device, known_as: str, limit: float) -> Verdict:
    """Run the cases on the device in a process of their own, at most `limit` seconds.

    Args:
        cases: as in `Proof.cases`.
        known_as: the key of the facts about the device: the other process must find the same.
    """
    name = facts(device)["device"]
    code = _START.format(path=[entry or os.getcwd() for entry in sys.path], arguments=(cases, str(device)))
    began = time.monotonic()
    if not sys.executable:
        return Verdict.of(UNKNOWN, "there is no Python to check kernels in", on=name)
    late = False
    try:
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                out, err = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
                late = True
    except OSError as error:
        return Verdict.of(UNKNOWN, f"no process can be started to check kernels in: {error}", on=name)
    lines = [json.loads(line) for line in out.decode(errors="replace").splitlines() if line.startswith("{")]
    outcome, why, done = _judged(lines, known_as)
    begun = any("begin" in line for line in lines)
    if outcome is None and late:
        # Before a case has begun, no kernel has run: nothing speaks against any.
        outcome, why = FAILED if begun else UNKNOWN, f"{_open_case(lines)} did not end within {limit:.3g} s"
    elif outcome is None:
        last = (err.decode(errors="replace").strip().splitlines() or ["nothing was said"])[-1]
        outcome = FAILED if begun and not _passes(last) else UNKNOWN
        why = f"{_open_case(lines)} ended its process (status {process.returncode}): {last}"
    return Verdict.of(outcome, why, done, time.monotonic() - began, name)


def _judged(lines: list[dict[str, Any]], known_as: str) -> tuple[str | None, str | None, int]:
    """Outcome, reason and number of cases of what the other process has said; no outcome if it has not said all."""
    done = 0
    for line in lines:
        if "key" in line and line["key"] != known_as:
            return UNKNOWN, "another process finds another device, or other kernels, than this one", done
        if "failure" in line:
            done += 1
            if line["failure"] is not None:
                return (UNKNOWN if line["passes"] else FAILED), line["failure"], done
        if line.get("end"):
            return (PROVED, None, done) if done else (FAILED, "there are no cases", done)
    return None, None, done


def _open_case(lines: list[dict[str, Any]]) -> str:
    """The case that was begun and not ended."""
    begun = [line["begin"] for line in lines if "begin" in line]
    return f"case {begun[-1]!r}" if begun else "the preparation"


def _passes(message: str) -> bool:
    return any(words in message for words in _PASSING)


def main(arguments: tuple[str, str]) -> None:
    """Run the cases and say line by line what becomes of them; the first failure ends it."""
    cases, name = arguments
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _say(key=key_of(facts(device)))
    module, _, function = cases.partition(":")
    for case in getattr(importlib.import_module(module), function)(device):
        _say(begin=case.name)
        try:
            reason = failure(case)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what the case comes to
            reason = f"{case.name}: {type(error).__name__}: {' '.join(str(error).split())}"
        _say(failure=reason, passes=reason is not None and _passes(reason))
        if reason is not None:
            return
    _say(end=True)


def _say(**line: Any) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
