"""The Triton backend of k-means, imported when it is first used: this module needs neither Triton nor a GPU."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from fusion_kernels.reference.kmeans import Results


@functools.cache
def why_not() -> str | None:
    """In one line why the backend cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: install triton>=3.6"
    if torch.version.hip is not None:
        return "it is for NVIDIA GPUs: this torch is built for AMD's"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if min(torch.cuda.get_device_capability(i)[0] for i in range(torch.cuda.device_count())) < 8:
        return "it needs GPUs of compute capability 8.0 or newer"
    return None


def kmeans(*arguments: Any) -> Results:
    """See `fusion_kernels.kmeans.triton_backend.kmeans`."""
    from fusion_kernels.kmeans import triton_backend

    return triton_backend.kmeans(*arguments)


def assign(x: Tensor, centroids: Tensor) -> Tensor:
    """See `fusion_kernels.kmeans.triton_assign.assign`."""
    from fusion_kernels.kmeans import triton_assign

    return triton_assign.assign(x, centroids)


def kmeans_fast(*arguments: Any) -> Results:
    """The same with one float16 product per pair of entries: a clustering of points rounded to 11 significant bits."""
    from fusion_kernels.kmeans import triton_backend

    return triton_backend.kmeans(*arguments, precision="fast")
