"""The Triton backend of k-means, imported when it is first used: this module needs neither Triton nor a GPU."""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch import Tensor

from fusion_kernels import gpu
from fusion_kernels.kmeans.types import Algorithm, Metric, Results, Seeding
from fusion_kernels.library import BackendUnavailableError

#: The options that this backend does: any other is declined, until it stands here.
KNOWN: frozenset[Enum] = frozenset(
    {
        Seeding.PLUS_PLUS,
        Seeding.RANDOM,
        Algorithm.HARTIGAN,
        Algorithm.LLOYD,
        Metric.EUCLIDEAN,
    }
)


#: The kernels that float32 points need and that `gpu.KNOWN_BAD` may name.
_KERNELS = frozenset({"gram", "nearest"})


def why_not(device: torch.device | None = None) -> str | None:
    """In one line why this backend cannot run on the device, or on any if None; None if it can."""
    return gpu.why_not(device, _KERNELS)


def kmeans(*arguments: Any) -> Results:
    """See `fusion_kernels.kmeans.triton_backend.kmeans`.

    Raises:
        RuntimeError: a CUDA graph is being recorded.
    """
    _check_device(arguments[0])
    from fusion_kernels.kmeans import triton_backend

    return triton_backend.kmeans(*arguments)


def assign(x: Tensor, centroids: Tensor) -> Tensor:
    """See `fusion_kernels.kmeans.triton_assign.assign`."""
    _check_device(x)
    from fusion_kernels.kmeans import triton_assign

    return triton_assign.assign(x, centroids)


def kmeans_fast(*arguments: Any) -> Results:
    """The same with one float16 product per pair of entries: a clustering of points rounded to 11 significant bits."""
    _check_device(arguments[0])
    from fusion_kernels.kmeans import triton_backend

    return triton_backend.kmeans(*arguments, precision="fast")


def _check_device(x: Tensor) -> None:
    """Raise where the kernels cannot run: what is asked for by name has not been asked about this very device."""
    if not x.is_cuda:
        return
    reason = why_not(x.device)
    if reason is not None:
        raise BackendUnavailableError(f"kmeans: backend 'triton' on {x.device}: {reason}")
    refuse_capture(x)


def refuse_capture(x: Tensor) -> None:
    """Raise RuntimeError where a CUDA graph is being recorded."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "k-means reads answers from the device on its way, which a CUDA graph cannot record: cluster before the "
            "capture begins"
        )
