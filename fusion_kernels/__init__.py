"""Operators for shrinking feed-forward layers: k-means, tangent-kernel products, small layers, sparse and
projected updates."""

from fusion_kernels.experts import experts_backend, fused_experts
from fusion_kernels.gates import Gate
from fusion_kernels.hadamard import fastfood, fastfood_transposed, hadamard_transform
from fusion_kernels.kmeans import KMeansResult, Status, kmeans, kmeans_assign
from fusion_kernels.library import BackendUnavailableError, backends
from fusion_kernels.mlp import fused_glu_mlp, fused_mlp, mlp_backend, split_gate_up
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
from fusion_kernels.sparse import sampled_product

__all__ = [
    "BackendUnavailableError",
    "Gate",
    "KMeansResult",
    "NTKComparison",
    "NTKOperator",
    "Status",
    "backends",
    "experts_backend",
    "fastfood",
    "fastfood_transposed",
    "fused_experts",
    "fused_glu_mlp",
    "fused_mlp",
    "gradient_dots",
    "gradient_gram",
    "gradient_norms",
    "hadamard_transform",
    "jvp",
    "kmeans",
    "kmeans_assign",
    "mlp_backend",
    "ntk_compare",
    "ntk_gram",
    "ntk_operator",
    "ntk_vp",
    "sampled_product",
    "split_gate_up",
    "trace_ntk_vp",
    "vjp",
]
