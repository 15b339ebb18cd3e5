"""Model families whose FFNs can be fused: one small file each, found by `config.model_type`."""

from __future__ import annotations

from mlp_fusion.errors import InputError
from mlp_fusion.families import bert, distilbert, gpt2, llama
from mlp_fusion.families.base import Architecture, FFNSite

ARCHITECTURES: dict[str, Architecture] = {
    model_type: entry
    for family in (bert, distilbert, gpt2, llama)
    for entry in family.ENTRIES
    for model_type in entry.model_types
}


def get_architecture(model_type: str) -> Architecture:
    """The entry for a `config.model_type`.

    Raises:
        InputError: no entry answers for it.
    """
    if model_type not in ARCHITECTURES:
        raise InputError(f"unknown architecture {model_type!r}: supported are {', '.join(sorted(ARCHITECTURES))}")
    return ARCHITECTURES[model_type]


__all__ = ["ARCHITECTURES", "Architecture", "FFNSite", "get_architecture"]
