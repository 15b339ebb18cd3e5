"""Shrink the feed-forward layers of a Transformer in one shot, keep their outputs and tangent kernel, and train on.

Importing this package also lets `AutoModel*.from_pretrained` load checkpoints whose layers differ in width. It imports
neither torch nor transformers: the names below are imported when they are asked for, and what changes in transformers
changes when transformers is imported.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from mlp_fusion.deferred import on_demand, when_imported

if TYPE_CHECKING:
    from mlp_fusion.checkpoint.compress import compress
    from mlp_fusion.checkpoint.plan import FusionPlan, plan
    from mlp_fusion.checkpoint.restoring import restore
    from mlp_fusion.checkpoint.states import state_form
    from mlp_fusion.checkpoint.verify import Verification, verify
    from mlp_fusion.errors import InputError
    from mlp_fusion.finetuning.result import FinetuneReport
    from mlp_fusion.finetuning.run import finetune
    from mlp_fusion.fusing import fuse
    from mlp_fusion.measure.report import FFNRow, FusionReport
    from mlp_fusion.modules import FusedExperts, FusedGLU, FusedMLP
    from mlp_fusion.neurons import NeuronBundle

__version__ = "0.1.0"

#: Public name -> the module that holds it.
_PLACES = {
    "FFNRow": "measure.report",
    "FinetuneReport": "finetuning.result",
    "FusedExperts": "modules",
    "FusedGLU": "modules",
    "FusedMLP": "modules",
    "FusionPlan": "checkpoint.plan",
    "FusionReport": "measure.report",
    "InputError": "errors",
    "NeuronBundle": "neurons",
    "Verification": "checkpoint.verify",
    "compress": "checkpoint.compress",
    "finetune": "finetuning.run",
    "fuse": "fusing",
    "plan": "checkpoint.plan",
    "restore": "checkpoint.restoring",
    "state_form": "checkpoint.states",
    "verify": "checkpoint.verify",
}

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
    "state_form",
    "verify",
]


__getattr__ = on_demand(__name__, _PLACES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_HOSTS = {
    "accelerate.utils.modeling",
    "torch.distributed.checkpoint.state_dict",
    "transformers.modeling_utils",
    "transformers.trainer",
    "transformers.trainer_utils",
}


def _is_host(name: str) -> bool:
    """Whether a module has functions that `checkpoint.hosts` wraps."""
    return name in _HOSTS or (name.startswith("transformers.models.") and ".modeling_" in name)


def _adapt(module: ModuleType) -> None:
    from mlp_fusion.checkpoint.hosts import adapt

    adapt(module)


when_imported(_is_host, _adapt)
