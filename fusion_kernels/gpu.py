"""What the GPU backends of all families share: whether they can run, what the GPU offers, how Triton kernels start.

This module needs neither Triton nor a GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

#: Shared memory that a program may use where the hardware offers little and where it offers much, in bytes.
SMALL_SHARED_MEMORY, LARGE_SHARED_MEMORY = 99 * 1024, 227 * 1024


@dataclass(frozen=True)
class Multiprocessor:
    """What programs share on one: bytes of shared memory, warps, programs; each has 65,536 registers."""

    shared_memory: int
    warps: int
    programs: int


#: By compute capability: NVIDIA's programming guide, "Technical Specifications per Compute Capability".
MULTIPROCESSORS = {
    80: Multiprocessor(164 * 1024, 64, 32),
    86: Multiprocessor(100 * 1024, 48, 16),
    89: Multiprocessor(100 * 1024, 48, 24),
    90: Multiprocessor(228 * 1024, 64, 32),
    100: Multiprocessor(228 * 1024, 64, 32),
    103: Multiprocessor(228 * 1024, 64, 32),
    120: Multiprocessor(100 * 1024, 48, 24),
}


def programs_at_once(registers: int, shared: int, num_warps: int, on: Multiprocessor) -> int:
    """How many programs of `registers` per thread and `shared` bytes run on a multiprocessor at once.

    A warp gets registers by the 256, each quarter of the multiprocessor has its own, and every program takes 1 KiB of
    shared memory beside its own.
    """
    warps = 4 * (65_536 // 4 // (-(-32 * registers // 256) * 256))
    return min(on.shared_memory // (shared + 1024), min(warps, on.warps) // num_warps, on.programs)


#: Why neither AMD's nor Intel's GPUs run the kernels, though their compilers may take them.
_NVIDIA_ONLY = "its tiles and its bounds on rounding are those of NVIDIA's shared memory, warps and tensor cores"


@dataclass(frozen=True)
class KnownBad:
    """Kernels that releases of Triton compile wrongly for some GPUs.

    Attributes:
        major: of the compute capability.
        before: the first release, (major, minor), without the fault.
        kernels: names of the kernels, without `_` and `_kernel`.
        fault: what goes wrong.
    """

    major: int
    before: tuple[int, int]
    kernels: frozenset[str]
    fault: str


#: What is refused before anything else is asked: silently wrong numbers, and launches that do not fit.
KNOWN_BAD = (
    # triton-lang/triton#10821: products that follow each other into one accumulator, in a loop, on tcgen05.
    KnownBad(10, (3, 9), frozenset({"gram", "nearest", "resident", "ntk_tile"}), "adds products up wrongly"),
)


def capability(device: torch.device) -> tuple[int, int]:
    """(major, minor) of a CUDA device; (0, 0) of any other, where kernels are interpreted."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.cache
def no_gpu(device: torch.device | None = None) -> str | None:
    """In one line why kernels for NVIDIA GPUs cannot run, whatever they are compiled with, or None.

    Asking for GPUs keeps the program from forking afterwards: not while the package is imported.

    Args:
        device: where they are to run; None for any of the devices, since one that is too old does not keep others from
            being used.
    """
    if torch.version.hip is not None:
        return f"it is for NVIDIA GPUs, and this torch is built for AMD's: {_NVIDIA_ONLY}"
    if not torch.cuda.is_available():
        if torch.xpu.is_available():
            return f"it is for NVIDIA GPUs, and this one is Intel's: {_NVIDIA_ONLY}"
        return "torch finds no CUDA device"
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if device is None else [device]
    if max(capability(each)[0] for each in devices) < 8:
        return "it needs a GPU of compute capability 8.0 or newer"
    return None


@functools.cache
def why_not(device: torch.device | None = None, kernels: frozenset[str] = frozenset()) -> str | None:
    """In one line why Triton backends cannot run, or None.

    Args:
        device: where they are to run; None for any of the devices.
        kernels: which of the kernels named in `KNOWN_BAD` the backend launches.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: install triton>=3.6"
    reason = no_gpu(device)
    if reason is not None:
        return reason
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if device is None else [device]
    faults = [known_bad(kernels, each) for each in devices if no_gpu(each) is None]
    return None if None in faults else faults[0]


def known_bad(kernels: frozenset[str], device: torch.device) -> str | None:
    """In one line why these kernels must not be compiled for the device by the Triton that is installed, or None."""
    major, minor = capability(device)
    for entry in KNOWN_BAD:
        if entry.major != major or not entry.kernels & kernels:
            continue
        version = str(importlib.import_module("triton").__version__)
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < entry.before:
            names, fixed = ", ".join(sorted(entry.kernels & kernels)), ".".join(map(str, entry.before))
            return (
                f"triton {version} {entry.fault} in its kernels ({names}) on compute capability {major}.{minor}: "
                f"install triton>={fixed}"
            )
    return None


def shared_memory(device: torch.device) -> int:
    """Bytes that one program may use; little where kernels are interpreted."""
    if device.type != "cuda":
        return SMALL_SHARED_MEMORY
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def free_memory(device: torch.device) -> int:
    """Bytes of a CUDA device that tensors may still take: what is free, and what torch keeps and does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def device_guard(x: Tensor) -> AbstractContextManager[object]:
    """Kernels are launched on the current device: make that the one of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def on_boundary(*tensors: Tensor | None) -> bool:
    """Whether all of them begin at a multiple of 16 bytes: else they are loaded in smaller pieces, by other code."""
    return all(x is None or x.data_ptr() % 16 == 0 for x in tensors)


def packed(x: Tensor) -> Tensor:
    """x, contiguous and beginning at a multiple of 16 bytes: a kernel then has one form, whatever x is a view of."""
    x = x.contiguous()
    return x if on_boundary(x) else x.clone()


def pointers(*records: object) -> dict[str, Tensor]:
    """The tensors among the attributes of `records` as kernels name them, `<attribute>_ptr`; of equals the last."""
    return {f"{name}_ptr": x for record in records for name, x in vars(record).items() if isinstance(x, Tensor)}


def named(kernel: Any, shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a launch: `own`, and of what is `shared` by many kernels what this one has a parameter for."""
    return {name: shared[name] for name in kernel.arg_names if name in shared} | dict(own)


#: One thread records, or launches what was recorded, at a time.
_RECORDING = threading.Lock()


@functools.cache
def _recording_stream(device: int) -> torch.cuda.Stream:
    """A stream for recordings alone: what anybody else launches on it meanwhile would be recorded too.

    Of high priority, since streams come from a pool, and hardly anybody asks for those.
    """
    return torch.cuda.Stream(device, priority=-1)


def recorded(work: Callable[[], object]) -> Callable[[], None]:
    """What launches all kernels of `work` at once, on the current stream: they are recorded in a graph, and not run.

    Kernels of `work` have been compiled, it takes no memory, and it asks the device nothing. What the kernels read and
    write has to last until they have run; the graph need not, since CUDA frees one that is on its way when it is over.
    Other threads may go on using the device, but for its random numbers in releases of torch that know of one recording
    at a time: those refuse to draw any meanwhile, and so launches wait for recordings, too.
    """
    graph = torch.cuda.CUDAGraph()
    with _RECORDING, torch.cuda.stream(_recording_stream(torch.cuda.current_device())):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()

    def replay() -> None:
        with _RECORDING:
            graph.replay()

    return replay


#: Of the compiler, beside a launch's own: a multiply and an add may become one instruction, which rounds once. That has
#: been Triton's default, and will not stay it.
OPTIONS: Mapping[str, Any] = MappingProxyType({"enable_fp_fusion": True})


def launch(kernel: Any, programs: int, shared: Mapping[str, Any] = MappingProxyType({}), **own: Any) -> None:
    """Launch `programs` programs of a kernel; every argument goes to the parameter of its name.

    Args:
        shared: what many kernels are told; each takes what it has parameters for.
        own: what this one is told beside or instead, its constants, `num_warps`, `num_stages` and `maxnreg`.

    Raises:
        TypeError: a parameter is left without an argument, or an argument of `own` without a parameter.
    """
    kernel[(programs,)](**named(kernel, shared, own), **OPTIONS)
