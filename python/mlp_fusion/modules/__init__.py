"""Drop-in feed-forward modules with the size-scaling vector."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlp_fusion.deferred import on_demand
from mlp_fusion.modules.ffn import FusedFFN, FusedGLU, FusedMLP
from mlp_fusion.modules.scaled import Scaled
from mlp_fusion.modules.scaled_activation import ScaledActivation
from mlp_fusion.modules.scaled_weights import ScaledWeights

if TYPE_CHECKING:
    from mlp_fusion.modules.experts import FusedExperts

__all__ = ["FusedExperts", "FusedFFN", "FusedGLU", "FusedMLP", "Scaled", "ScaledActivation", "ScaledWeights"]

# What experts need of transformers takes seconds to import, and plans do not need it.
__getattr__ = on_demand(__name__, {"FusedExperts": "experts"})
