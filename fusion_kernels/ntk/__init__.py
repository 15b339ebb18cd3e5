"""The empirical neural tangent kernel of a feed-forward block, without Jacobians."""

from __future__ import annotations

from fusion_kernels.ntk.compare import NTKComparison, ntk_compare
from fusion_kernels.ntk.gradients import gradient_dots, gradient_gram, gradient_norms
from fusion_kernels.ntk.gram import ntk_gram
from fusion_kernels.ntk.jacobian import NTKOperator, jvp, ntk_operator, ntk_vp, trace_ntk_vp, vjp
from fusion_kernels.ntk.types import Block, Kernel, Reduce

__all__ = [
    "Block",
    "Kernel",
    "NTKComparison",
    "NTKOperator",
    "Reduce",
    "gradient_dots",
    "gradient_gram",
    "gradient_norms",
    "jvp",
    "ntk_compare",
    "ntk_gram",
    "ntk_operator",
    "ntk_vp",
    "trace_ntk_vp",
    "vjp",
]
