"""Arguments of modules that cannot be called alone, recorded while the whole model runs on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mlp_fusion.families.building import materialise
from mlp_fusion.families.inputs import guessed_inputs

#: Entries of the largest model that is run with values.
_LARGEST_RUN = 1_000_000_000


class _EnoughError(Exception):
    """Every module that was waited for has been called."""


Call = tuple[tuple[Any, ...], dict[str, Any]]


def record_arguments(model: nn.Module, wanted: set[str]) -> dict[str, Call]:
    """What the modules at the paths `wanted` are called with, tensors with random entries in place of hidden states.

    The model, on the meta device, is run on guesses at its inputs, until one reaches every module or all were tried.
    Where its control flow wants values, a copy runs whose matrices are zeros without memory of their own. Modules that
    no guess reaches are left out.
    """
    recorded = _run(model, wanted, "meta")
    if recorded.keys() < wanted and sum(p.numel() for p in model.parameters()) < _LARGEST_RUN:
        recorded = {**_run(materialise(model, set(), large=True), wanted - recorded.keys(), "cpu"), **recorded}
    g = torch.Generator().manual_seed(2)
    return {
        path: (tuple(_real("", a, g) for a in args), {k: _real(k, v, g) for k, v in kwargs.items()})
        for path, (args, kwargs) in recorded.items()
    }


def _run(model: nn.Module, wanted: set[str], device: str) -> dict[str, Call]:
    recorded: dict[str, Call] = {}

    def note(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            recorded.setdefault(path, (args, kwargs))
            if recorded.keys() >= wanted:
                raise _EnoughError

        return hook

    hooks = [
        module.register_forward_pre_hook(note(path), with_kwargs=True)
        for path, module in model.named_modules()
        if path in wanted
    ]
    try:
        for inputs in guessed_inputs(model):
            try:
                with torch.no_grad(), torch.device(device):
                    model(**{name: value.to(device) for name, value in inputs.items()})
                break  # what it has not called now, it will not call on other inputs
            except _EnoughError:
                break
            except Exception:  # noqa: BLE001  (a guess that the model does not take)
                continue
    finally:
        for hook in hooks:
            hook.remove()
    return recorded


def _real(name: str, value: Any, g: torch.Generator) -> Any:
    """A real value with random hidden states; masks and numbers are as they were, where they were real."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and "mask" not in name:
            return torch.randn(value.shape, generator=g)
        if not value.is_meta:
            return value
        return torch.full(value.shape, value.dtype == torch.bool, dtype=value.dtype)
    if isinstance(value, (tuple, list)):
        return type(value)(_real(name, part, g) for part in value) if type(value) in (tuple, list) else value
    if isinstance(value, Mapping):
        return {key: _real(str(key), part, g) for key, part in value.items()}
    return None if "Cache" in type(value).__name__ else value
