"""Drop-in feed-forward modules with the size-scaling vector."""

from mlp_fusion.modules.experts import FusedExperts
from mlp_fusion.modules.ffn import FusedFFN, FusedGLU, FusedMLP

__all__ = ["FusedExperts", "FusedFFN", "FusedGLU", "FusedMLP"]
