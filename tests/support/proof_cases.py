"""Cases of proofs that go well and wrong in every way, for the process that runs them: by `proof_cases:<function>`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fusion_kernels.proof.cases import Case, Found, beyond


def _doubling(device: torch.device, double: Callable[[Tensor], Tensor], name: str = "doubling") -> Case:
    x = torch.arange(5.0)

    def run() -> Found:
        return {"y": double(x.to(device))}

    return Case(name, run, lambda found: beyond("y", found["y"], 2 * x, 1e-6))


def right(device: torch.device) -> list[Case]:
    return [_doubling(device, lambda x: x + x), _doubling(device, lambda x: 2 * x, "again")]


def counted(device: torch.device) -> list[Case]:
    """Right, slowly, with a line for each time in the file that `COUNTED` names."""
    with Path(os.environ["COUNTED"]).open("a", encoding="utf-8") as file:
        file.write("run\n")
    time.sleep(0.5)
    return right(device)


def wrong(device: torch.device) -> list[Case]:
    return [*right(device), _doubling(device, lambda x: 2.001 * x, "slightly off")]


def unwritten(device: torch.device) -> list[Case]:
    """One entry is left as the memory was."""

    def double(x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        y[1:] = 2 * x[1:]
        return y

    return [_doubling(device, double, "unwritten")]


def other_bits(device: torch.device) -> list[Case]:
    """Within the bound, and not the same twice."""
    calls = iter(range(1000))
    return [_doubling(device, lambda x: 2 * x + 1e-7 * next(calls), "racing")]


def raising(device: torch.device) -> list[Case]:
    def double(x: Tensor) -> Tensor:
        raise RuntimeError("an illegal memory\naccess was encountered")

    return [_doubling(device, double, "illegal")]


def full(device: torch.device) -> list[Case]:
    def double(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    return [_doubling(device, double, "large")]
