"""The empirical neural tangent kernel of a feed-forward block, without Jacobians."""

from __future__ import annotations

from fusion_kernels.ntk.block import Block, Bundle, Kernel
from fusion_kernels.ntk.gram import _NTK_GRAM, _NTK_GRAM_OUT, Reduce, ntk_gram

__all__ = ["_NTK_GRAM", "_NTK_GRAM_OUT", "Block", "Bundle", "Kernel", "Reduce", "ntk_gram"]
