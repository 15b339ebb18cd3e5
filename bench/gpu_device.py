"""The first stage of bench/gpu.py: which device it is, what runs on it, and the rates that floors refer to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import gpu_timing
import torch
from gpu_running import ROOT, Told, Work

from fusion_kernels import backends, gpu
from fusion_kernels.proof.key import digest, facts


def lines(told: Told) -> Iterator[tuple[str, Work]]:
    """Facts, and rates."""
    yield "facts", _facts
    if gpu.why_not() is None:
        yield "rates", rates


def _facts() -> dict[str, Any]:
    reason = gpu.why_not()
    if reason is not None:
        return {"why_not": reason}
    properties: Any = torch.cuda.get_device_properties(gpu_timing.DEVICE)
    about = what_lines_depend_on(facts(torch.device(gpu_timing.DEVICE, torch.cuda.current_device())))
    return {
        "about": about, "memory": properties.total_memory, "processors": len(os.sched_getaffinity(0)),
        "backends": backends(), "brief": f"{about['device']}, torch {about['torch']}, triton {about['triton']}",
    }  # fmt: skip


def what_lines_depend_on(about: dict[str, str]) -> dict[str, str]:
    """The facts of a proof, but sources of compiled libraries in place of the library that a later stage builds."""
    return {name: value for name, value in about.items() if name != "cuda library"} | {
        "compiled sources": digest(ROOT / "csrc", ("**/*",))
    }


def rates() -> dict[str, Any]:
    """The ceilings."""
    found = gpu_timing.ceilings()
    brief = f"{found['bf16_flops'] / 1e12:.0f} TFLOP/s, {found['copy_bytes'] / 1e12:.2f} TB/s"
    return {**found, "brief": brief}


def known_rates(told: Told) -> dict[str, float]:
    """The ceilings that this run has measured, or those of now where it could not."""
    return dict(told.found.get("device", {}).get("rates") or rates())
