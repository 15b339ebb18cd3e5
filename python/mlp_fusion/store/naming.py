"""Tensors of a checkpoint on disk and the parameters of a model that they become."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


@dataclass(frozen=True)
class Place:
    """Where a tensor goes.

    Attributes:
        parameter: name in the model; of several that one tensor becomes, the first.
        converted: it does not go there as it is: it is stacked, split, transposed or joined with others.
    """

    parameter: str
    converted: bool


def places(model: Any, names: Iterable[str]) -> dict[str, Place]:
    """Name on disk -> its place in `model`, as transformers loads it; without those that have none.

    Args:
        model: a `PreTrainedModel`, on the meta device or not.
        names: of tensors.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known: dict[str, Any] = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    found = {}
    for name in names:
        own, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if own in known:
            found[name] = Place(own, pattern is not None)
        elif name in known:
            found[name] = Place(name, False)
    return found
