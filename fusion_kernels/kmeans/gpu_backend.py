"""The Triton backend of k-means, imported when it is first used: this module needs neither Triton nor a GPU."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

from fusion_kernels import native
from fusion_kernels.reference.kmeans import Results


@functools.cache
def why_not() -> str | None:
    """In one line why the backend cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: install triton>=3.6"
    return native.no_gpu()


def kmeans(*arguments: Any) -> Results:
    """See `fusion_kernels.kmeans.triton_backend.kmeans`."""
    from fusion_kernels.kmeans import triton_backend

    return triton_backend.kmeans(*arguments)


def kmeans_fast(*arguments: Any) -> Results:
    """The same with one float16 product per pair of entries: a clustering of points rounded to 11 significant bits."""
    from fusion_kernels.kmeans import triton_backend

    return triton_backend.kmeans(*arguments, precision="fast")
