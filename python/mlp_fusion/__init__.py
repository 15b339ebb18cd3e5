"""Shrink the feed-forward layers of a Transformer in one shot, keep their outputs and tangent kernel, and train on.

Importing this package also lets `AutoModel*.from_pretrained` load checkpoints whose layers differ in width.
"""

from mlp_fusion.checkpoint import hosts as _hosts
from mlp_fusion.checkpoint.compress import compress
from mlp_fusion.checkpoint.folding import restore
from mlp_fusion.checkpoint.plan import FusionPlan, plan
from mlp_fusion.checkpoint.verify import Verification, verify
from mlp_fusion.errors import InputError
from mlp_fusion.finetuning.result import FinetuneReport
from mlp_fusion.finetuning.run import finetune
from mlp_fusion.fusing import fuse
from mlp_fusion.measure import FFNRow, FusionReport
from mlp_fusion.modules import FusedExperts, FusedGLU, FusedMLP
from mlp_fusion.neurons import NeuronBundle

_hosts.register()

__version__ = "0.1.0"

__all__ = [
    "FFNRow",
    "FinetuneReport",
    "FusedExperts",
    "FusedGLU",
    "FusedMLP",
    "FusionPlan",
    "FusionReport",
    "InputError",
    "NeuronBundle",
    "Verification",
    "compress",
    "finetune",
    "fuse",
    "plan",
    "restore",
    "verify",
]
