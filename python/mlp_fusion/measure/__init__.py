"""What a compression cost: errors of outputs and of the tangent kernel, sentence embeddings, the report."""

from mlp_fusion.measure.errors import FFNErrors, ffn_errors, relative_error
from mlp_fusion.measure.models import KernelRow, ModelComparison, NetworkKernel, compare_models
from mlp_fusion.measure.report import FFNRow, FusionReport

__all__ = [
    "FFNErrors",
    "FFNRow",
    "FusionReport",
    "KernelRow",
    "ModelComparison",
    "NetworkKernel",
    "compare_models",
    "ffn_errors",
    "relative_error",
]
