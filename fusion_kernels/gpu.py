"""What the GPU backends of all families share: whether they can run, what the GPU offers, how Triton kernels start.

This module needs neither Triton nor a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

#: Shared memory that a program may use where the hardware offers little and where it offers much, in bytes.
SMALL_SHARED_MEMORY, LARGE_SHARED_MEMORY = 99 * 1024, 227 * 1024


@functools.cache
def no_gpu() -> str | None:
    """In one line why kernels for NVIDIA GPUs cannot run here, whatever they are compiled with, or None.

    Asking for GPUs keeps the program from forking afterwards: not while the package is imported.
    """
    if torch.version.hip is not None:
        return "it is for NVIDIA GPUs: this torch is built for AMD's"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if min(torch.cuda.get_device_capability(i)[0] for i in range(torch.cuda.device_count())) < 8:
        return "it needs GPUs of compute capability 8.0 or newer"
    return None


@functools.cache
def why_not() -> str | None:
    """In one line why Triton backends cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: install triton>=3.6"
    return no_gpu()


def shared_memory(device: torch.device) -> int:
    """Bytes that one program may use; little where kernels are interpreted."""
    if device.type != "cuda":
        return SMALL_SHARED_MEMORY
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def device_guard(x: Tensor) -> AbstractContextManager[object]:
    """Kernels are launched on the current device: make that the one of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def pointers(*records: object) -> dict[str, Tensor]:
    """The tensors among the attributes of `records` as kernels name them, `<attribute>_ptr`; of equals the last."""
    return {f"{name}_ptr": x for record in records for name, x in vars(record).items() if isinstance(x, Tensor)}


def named(kernel: Any, shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a launch: `own`, and of what is `shared` by many kernels what this one has a parameter for."""
    return {name: shared[name] for name in kernel.arg_names if name in shared} | dict(own)


def launch(kernel: Any, programs: int, shared: Mapping[str, Any] = MappingProxyType({}), **own: Any) -> None:
    """Launch `programs` programs of a kernel; every argument goes to the parameter of its name.

    Args:
        shared: what many kernels are told; each takes what it has parameters for.
        own: what this one is told beside or instead, its constants, `num_warps` and `num_stages`.

    Raises:
        TypeError: a parameter is left without an argument, or an argument of `own` without a parameter.
    """
    kernel[(programs,)](**named(kernel, shared, own))
