"""Tensors of a checkpoint on disk and the parameters of a model that they become."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

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
    for name, plain in plain_names(model.config, names).items():
        own, pattern = rename_source_key(plain, renamings, converters, model.base_model_prefix, known)
        quantised = quantisation(model.config) is not None
        if own in known:
            found[name] = Place(own, pattern is not None or quantised)
        elif plain in known:
            found[name] = Place(plain, quantised)
    return found
