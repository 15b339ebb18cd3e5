"""Which modules of a model are the projections of its FFNs."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from mlp_fusion.errors import InputError
from mlp_fusion.modules import ScaledWeights
from mlp_fusion.store.record import architecture_of


def ffn_projections(model: Any) -> list[str]:
    """Names of the linear projections of the model's dense FFNs, fused ones too, in the order of its modules.

    Raises:
        InputError: `model` has no config of transformers, or no such FFN.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        raise InputError(f"{type(model).__name__} is no model of transformers: say where to work with target_modules")
    architecture = architecture_of(config)
    found: dict[str, None] = {}
    for site in architecture.sites(model):
        if not site.kind.experts:
            for projection in site.kind.projections:
                found[f"{site.path}.{projection.parameter.rpartition('.')[0]}".lstrip(".")] = None
    names = [name for name in found if is_projection(_within(model, name))]
    if not names:
        raise InputError(f"{config.model_type}: no dense FFN was found: say where to work with target_modules")
    return names


def is_projection(module: nn.Module) -> bool:
    """Whether a module multiplies by one matrix, its `weight`."""
    return isinstance(_computing(module), (nn.Linear, Conv1D))


def is_transposed(module: nn.Module) -> bool:
    """Whether a projection's weight is `(in, out)`, as GPT-2's, and not `(out, in)`."""
    return isinstance(_computing(module), Conv1D)


def is_plain(module: nn.Module) -> bool:
    """Whether a projection computes `x W^T + b` with its weight and bias as they are, and nothing else."""
    return type(module) in (nn.Linear, Conv1D)


def _computing(module: nn.Module) -> nn.Module:
    return module._inner[0] if isinstance(module, ScaledWeights) else module


def _within(model: nn.Module, name: str) -> nn.Module:
    module = model.get_submodule(name)
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module  # type: ignore[operator, no-any-return]
