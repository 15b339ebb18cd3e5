"""Drop-in feed-forward modules with the size-scaling vector."""

from mlp_fusion.modules.ffn import FusedFFN, FusedGLU, FusedMLP

__all__ = ["FusedFFN", "FusedGLU", "FusedMLP"]
