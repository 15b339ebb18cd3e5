"""Shrink the feed-forward layers of a Transformer in one shot, keep their outputs and tangent kernel, and train on.

Importing this package also lets `AutoModel*.from_pretrained` load checkpoints whose layers differ in width, and adds
methods to peft. It imports neither torch nor transformers nor peft: the names below are imported when they are asked
for, and what changes in other libraries changes when they are imported.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from mlp_fusion.deferred import on_demand, when_imported

if TYPE_CHECKING:
    from mlp_fusion.companions.hiwi import HiWiConfig as HiWiConfig
    from mlp_fusion.companions.hiwi import save_merged_delta as save_merged_delta
    from mlp_fusion.companions.mpo import MpoConfig as MpoConfig
    from mlp_fusion.companions.operators import mpo_decompose as mpo_decompose
    from mlp_fusion.companions.pafi import PafiConfig as PafiConfig
    from mlp_fusion.companions.said import SaidConfig as SaidConfig
    from mlp_fusion.errors import InputError
    from mlp_fusion.finetuning.result import DistillReport, FinetuneReport
    from mlp_fusion.measure.report import FFNRow, FusionReport
    from mlp_fusion.minialbert.configuration import MiniAlbertConfig as MiniAlbertConfig
    from mlp_fusion.minialbert.modeling import MiniAlbertForMaskedLM as MiniAlbertForMaskedLM
    from mlp_fusion.minialbert.modeling import (
        MiniAlbertForSequenceClassification as MiniAlbertForSequenceClassification,
    )
    from mlp_fusion.minialbert.modeling import (
        MiniAlbertForTokenClassification as MiniAlbertForTokenClassification,
    )
    from mlp_fusion.minialbert.modeling import MiniAlbertModel as MiniAlbertModel
    from mlp_fusion.modules import FusedExperts, FusedGLU, FusedMLP
    from mlp_fusion.neurons import NeuronBundle
    from mlp_fusion.store.restoring import restore
    from mlp_fusion.store.states import state_form
    from mlp_fusion.verbs.compress import compress
    from mlp_fusion.verbs.distill import distill
    from mlp_fusion.verbs.finetune import finetune
    from mlp_fusion.verbs.fuse import fuse
    from mlp_fusion.verbs.plan import FusionPlan, plan
    from mlp_fusion.verbs.squeeze import SqueezeReport as SqueezeReport
    from mlp_fusion.verbs.squeeze import squeeze as squeeze
    from mlp_fusion.verbs.verify import Verification, verify

__version__ = "0.1.0"

#: Public name -> the module that holds it.
_PLACES = {
    "DistillReport": "finetuning.result",
    "FFNRow": "measure.report",
    "FinetuneReport": "finetuning.result",
    "FusedExperts": "modules",
    "FusedGLU": "modules",
    "FusedMLP": "modules",
    "FusionPlan": "verbs.plan",
    "FusionReport": "measure.report",
    "HiWiConfig": "companions.hiwi",
    "InputError": "errors",
    "MiniAlbertConfig": "minialbert.configuration",
    "MiniAlbertForMaskedLM": "minialbert.modeling",
    "MiniAlbertForSequenceClassification": "minialbert.modeling",
    "MiniAlbertForTokenClassification": "minialbert.modeling",
    "MiniAlbertModel": "minialbert.modeling",
    "MpoConfig": "companions.mpo",
    "NeuronBundle": "neurons",
    "PafiConfig": "companions.pafi",
    "SaidConfig": "companions.said",
    "SqueezeReport": "verbs.squeeze",
    "Verification": "verbs.verify",
    "compress": "verbs.compress",
    "distill": "verbs.distill",
    "finetune": "verbs.finetune",
    "fuse": "verbs.fuse",
    "mpo_decompose": "companions.operators",
    "plan": "verbs.plan",
    "restore": "store.restoring",
    "save_merged_delta": "companions.hiwi",
    "squeeze": "verbs.squeeze",
    "state_form": "store.states",
    "verify": "verbs.verify",
}

#: Without the names that need peft: `from mlp_fusion import *` works without it.
__all__ = [
    "DistillReport",
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
    "distill",
    "finetune",
    "fuse",
    "plan",
    "restore",
    "state_form",
    "verify",
]


__getattr__ = on_demand(__name__, _PLACES)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})


_HOSTS = {
    "accelerate.utils.modeling",
    "torch.distributed.checkpoint.state_dict",
    "transformers.modeling_utils",
    "transformers.models.auto.configuration_auto",
    "transformers.trainer",
    "transformers.trainer_utils",
}


def _adapt(module: ModuleType) -> None:
    from mlp_fusion.store.hosts import adapt

    adapt(module)


def _enter_companions(peft: ModuleType) -> None:
    """Companions enter peft's registry; a peft too old for them stays as it is, and asking for one of them says so."""
    import importlib

    from mlp_fusion.choices import COMPANIONS, PEFT_NEEDED

    if tuple(map(int, peft.__version__.split(".")[:2])) >= PEFT_NEEDED:
        for name in COMPANIONS:
            importlib.import_module(f"mlp_fusion.companions.{name}")


when_imported(_HOSTS.__contains__, _adapt)
when_imported("peft".__eq__, _enter_companions)
