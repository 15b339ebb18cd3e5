"""Operators for shrinking feed-forward layers: weighted k-means on neuron vectors and empirical-NTK products."""

from fusion_kernels.kmeans import KMeansResult, Status, kmeans, kmeans_assign
from fusion_kernels.library import BackendUnavailableError, backends
from fusion_kernels.ntk import (
    NTKComparison,
    NTKOperator,
    gradient_dots,
    gradient_gram,
    gradient_norms,
    jvp,
    ntk_compare,
    ntk_gram,
    ntk_operator,
    ntk_vp,
    trace_ntk_vp,
    vjp,
)

__all__ = [
    "BackendUnavailableError",
    "KMeansResult",
    "NTKComparison",
    "NTKOperator",
    "Status",
    "backends",
    "gradient_dots",
    "gradient_gram",
    "gradient_norms",
    "jvp",
    "kmeans",
    "kmeans_assign",
    "ntk_compare",
    "ntk_gram",
    "ntk_operator",
    "ntk_vp",
    "trace_ntk_vp",
    "vjp",
]
