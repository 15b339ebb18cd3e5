"""How Triton kernels are launched, and what the GPU offers them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fusion_kernels.kmeans import triton_tuning as tuning


def shared_memory(device: torch.device) -> int:
    """Bytes that one program may use."""
    if device.type != "cuda":
        return tuning.SMALL_SHARED_MEMORY
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def device_guard(x: Tensor) -> AbstractContextManager[object]:
    """Kernels are launched on the current device: make that the one of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Launch `programs` programs of a kernel; options are its constants, `num_warps` and `num_stages`."""
    kernel[(programs,)](*arguments, **options)
