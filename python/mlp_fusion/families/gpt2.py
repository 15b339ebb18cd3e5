"""GPT-2: transposed `Conv1D` projections, and a width that may be left out of the config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlp_fusion.families.base import Architecture


@dataclass(frozen=True)
class GPT2Architecture(Architecture):
    """GPT-2, whose `n_inner=None` means four times the hidden size."""

    def width(self, config: Any) -> int:
        n_inner = getattr(config, self.width_key)
        return int(4 * config.hidden_size if n_inner is None else n_inner)


ENTRIES = (
    GPT2Architecture(
        model_types=("gpt2",),
        base="transformer",
        layers="h",
        module="mlp",
        projections={"w_in": "mlp.c_fc", "w_out": "mlp.c_proj"},
        layer_class="transformers.models.gpt2.modeling_gpt2:GPT2Block",
        width_key="n_inner",
        activation_key="activation_function",
        dropout="mlp.dropout",
        transposed=True,
    ),
)
