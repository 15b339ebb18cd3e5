"""Operators for shrinking feed-forward layers: weighted k-means on neuron vectors and empirical-NTK products."""

from fusion_kernels.kmeans import KMeansResult, Status, kmeans, kmeans_assign
from fusion_kernels.library import BackendUnavailableError, backends
from fusion_kernels.ntk import ntk_gram

__all__ = ["BackendUnavailableError", "KMeansResult", "Status", "backends", "kmeans", "kmeans_assign", "ntk_gram"]
