"""The Triton backend of k-means, imported when it is first used: this module needs neither Triton nor a GPU."""

from __future__ import annotations

from enum import Enum
from typing import Any

from torch import Tensor

from fusion_kernels.kmeans.types import Algorithm, Metric, Results, Seeding

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
