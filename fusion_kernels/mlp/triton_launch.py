"""How the Triton kernels of the MLP are launched: on which device, in which precision, over which rows."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fusion_kernels.gates import Gate
from fusion_kernels.gpu import Multiprocessor, device_guard, launch, shared_memory
from fusion_kernels.mlp.triton_heuristics import HALF, IEEE, TF32, Gpu


@functools.cache
def gpu(device: torch.device) -> Gpu:
    """What the device offers; an interpreted kernel on the CPU runs one program at a time."""
    if device.type != "cuda":
        return Gpu(shared_memory(device), 1)
    known: Any = torch.cuda.get_device_properties(device)
    # What torch does not say is the same on all of them, or as on the smallest.
    shared, warps = known.shared_memory_per_multiprocessor, known.max_threads_per_multi_processor // 32
    return Gpu(shared_memory(device), known.multi_processor_count, Multiprocessor(shared, warps, 16))


def kind(dtype: torch.dtype) -> str:
    """What products of this dtype are made of: float32 follows `torch.backends.cuda.matmul.fp32_precision`.

    Raises:
        ValueError: the kernels are not for this dtype.
    """
    if dtype in (torch.float16, torch.bfloat16):
        return HALF
    if dtype != torch.float32:
        raise ValueError(f"the Triton kernels take float16, bfloat16 and float32, not {dtype}: convert x first")
    return TF32 if torch.backends.cuda.matmul.fp32_precision == "tf32" else IEEE


def gate_of(gating: Gate, dtype: torch.dtype) -> tuple[float | None, str, float] | None:
    """What a kernel is told of a gate: None of a plain one, else its fields, the limit as one of the dtype."""
    if gating.plain:
        return None
    limit, clamp, up_offset = gating.arguments
    return None if limit is None else torch.tensor(limit, dtype=dtype, device="cpu").item(), clamp, up_offset


def row_stride(x: Tensor) -> int:
    """Entries from one row of x (T, n) to the next.

    Raises:
        ValueError: the entries of a row are not neighbours.
    """
    if x.stride(1) != 1 and x.shape[1] > 1:
        raise ValueError(f"rows must be contiguous, strides are {tuple(x.stride())}: call .contiguous() first")
    return x.stride(0)


def start(kernel: Any, programs: int, x: Tensor, shared: Mapping[str, Any] = MappingProxyType({}), **own: Any) -> None:
    """Launch a kernel on the device of x, by keyword as `gpu.launch` does; no programs, no launch."""
    if programs == 0:
        return
    with device_guard(x):
        launch(kernel, programs, shared, **own)


def input_precision(precision: str) -> str:
    """What `tl.dot` is to be told of products of this kind."""
    return "tf32" if precision == TF32 else "ieee"


def ceil_div(value: int, divisor: int) -> int:
    """value / divisor, rounded up."""
    return -(-value // divisor)


def contiguous(bias: Tensor | None) -> Tensor | None:
    """The bias, if there is one, with its entries side by side."""
    return None if bias is None else bias.contiguous()
