"""Transforms and Fastfood on the CPU: the compiled passes of `csrc/cpu/hadamard.h`.

The bits do not depend on the number of threads, and those of :func:`hadamard` are the reference's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_kernels import native
from fusion_kernels.hadamard.scaling import scale_of
from fusion_kernels.hadamard.types import keys_of


def why_not(device: torch.device | None = None) -> str | None:
    """In one line why the backend cannot run here, or None."""
    return native.UNAVAILABLE


def hadamard(x: Tensor) -> Tensor:
    """See `reference.hadamard`."""
    return native.operators().hadamard(_rows(x)).view(x.shape)


def fastfood(theta: Tensor, size: int, seed: int) -> Tensor:
    """See `reference.fastfood`."""
    found: Tensor = native.operators().fastfood(_rows(theta), keys_of(seed).flat, size, scale_of(size, seed))
    return found.view(*theta.shape[:-1], size)


def fastfood_transposed(y: Tensor, length: int, seed: int) -> Tensor:
    """See `reference.fastfood_transposed`."""
    scale = scale_of(y.shape[-1], seed)
    found: Tensor = native.operators().fastfood_transposed(_rows(y), keys_of(seed).flat, length, scale)
    return found.view(*y.shape[:-1], length)


def _rows(x: Tensor) -> Tensor:
    return x.detach().reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()
