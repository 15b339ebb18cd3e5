"""Model families whose FFNs can be fused: one small file each, found by `config.model_type`."""

from __future__ import annotations

from mlp_fusion.families import bert, distilbert, gpt2, llama
from mlp_fusion.families.base import Architecture, FFNSite

ARCHITECTURES: dict[str, Architecture] = {
    model_type: entry
    for family in (bert, distilbert, gpt2, llama)
    for entry in family.ENTRIES
    for model_type in entry.model_types
}


__all__ = ["ARCHITECTURES", "Architecture", "FFNSite"]
