"""Operators for shrinking feed-forward layers: weighted k-means, empirical-NTK products, and the small layers."""

from fusion_kernels.experts import fused_experts
from fusion_kernels.kmeans import KMeansResult, Status, kmeans, kmeans_assign
from fusion_kernels.library import BackendUnavailableError, backends
from fusion_kernels.mlp import fused_glu_mlp, fused_mlp, mlp_backend, split_gate_up
from fusion_kernels.ntk import ntk_gram

__all__ = [
    "BackendUnavailableError",
    "KMeansResult",
    "Status",
    "backends",
    "fused_experts",
    "fused_glu_mlp",
    "fused_mlp",
    "kmeans",
    "kmeans_assign",
    "mlp_backend",
    "ntk_gram",
    "split_gate_up",
]
