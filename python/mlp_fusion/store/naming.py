"""Tensors of a checkpoint on disk and the parameters of a model that they become."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from mlp_fusion.store.quantised import plain_names, quantisation


@dataclass(frozen=True)
class Place:
    """Where a tensor goes.

    Attributes:
        parameter: name in the model; of several that one tensor becomes, the first.
        converted: it does not go there as it is: it is stacked, split, transposed, joined with others or dequantised.
    """

    parameter: str
    converted: bool


class Conversion:
    """How transformers makes the parameters of a model out of the tensors of its checkpoint.

    Args:
        model: a `PreTrainedModel`, on the meta device or not.
    """

    def __init__(self, model: Any) -> None:
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self._known: dict[str, Any] = {
            **dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())
        }  # fmt: skip
        self._model = model

    def place(self, name: str) -> tuple[str, str | None] | None:
        """The parameter (of several, the first) that the unquantised tensor `name` goes into, and the pattern of its
        converter, if any; None for a tensor that has no place.
        """
        own, pattern = rename_source_key(
            name, self._renamings, self._converters, self._model.base_model_prefix, self._known
        )
        if own in self._known:
            return own, pattern
        return (name, None) if name in self._known else None

    def parameters(self, name: str) -> list[str]:
        """All parameters that the unquantised tensor `name` may go into: of some conversions, only one does take it."""
        found = self.place(name)
        if found is None:
            return []
        own, pattern = found
        first, *others = self._by_pattern[pattern].target_patterns if pattern is not None else (own,)
        return [own, *(also for target in others if (also := own.replace(first, target)) in self._known)]

    def convert(
        self, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]] | None = None
    ) -> dict[str, Tensor]:
        """The parameters that unquantised tensors become: all of those that belong together have to be among them.

        Args:
            tensors: by their names on disk; those without a place are left out.
            shapes: of the parameters, where they are to be others than the model's: some conversions look.
        """
        model = self._model if shapes is None else _Resized(self._model, shapes)
        gathered: dict[str, Any] = {}
        for name in sorted(tensors, key=dot_natural_key):
            found = self.place(name)
            if found is None:
                continue
            own, pattern = found
            if pattern is None:
                gathered.setdefault(own, tensors[name])
                continue
            converter = gathered.setdefault(own, copy.deepcopy(self._by_pattern[pattern]))
            converter.add_tensor(own, name, pattern, tensors[name])
        made: dict[str, Tensor] = {}
        for own, value in gathered.items():
            if isinstance(value, Tensor):
                made[own] = value
                continue
            for name, result in value.convert(own, model=model, config=self._model.config).items():
                made[name] = result[0] if isinstance(result, list) else result
        return made

    def made(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters that unquantised tensors of these shapes become, by name."""
        nothing = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        return {name: tuple(tensor.shape) for name, tensor in self.convert(nothing).items()}


class _Resized:
    """A model with parameters of other shapes."""

    def __init__(self, model: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._model, self._shapes = model, shapes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty(self._shapes[name], device="meta")


def places(model: Any, names: Iterable[str]) -> dict[str, Place]:
    """Name on disk -> its place in `model`, as transformers loads it; without those that have none.

    Args:
        model: a `PreTrainedModel`, on the meta device or not.
        names: of tensors.
    """
    conversion, quantised = Conversion(model), quantisation(model.config) is not None
    found = {}
    for name, plain in plain_names(model.config, names).items():
        place = conversion.place(plain)
        if place is not None:
            found[name] = Place(place[0], place[1] is not None or quantised)
    return found
