"""The config of MiniALBERT, entered into `AutoConfig`."""

from __future__ import annotations

import importlib
from typing import Any

from transformers.models.albert.configuration_albert import AlbertConfig
from transformers.models.auto.configuration_auto import AutoConfig


class MiniAlbertConfig(AlbertConfig):
    """The shape of a MiniALBERT; its defaults are the paper's smallest student of BERT-base, of 12 million parameters.

    What it shares with `AlbertConfig` means the same; `num_hidden_layers` is how often the one layer is passed through.
    `num_hidden_groups` and `inner_group_num` have to be 1. With `embedding_size == hidden_size`, embeddings have no
    projection. Attributes of its own:

    - `adapter_size`: width of the bottlenecks of the adapters, two for every pass; 0 for a model without adapters. The
      paper's is `hidden_size / 16`.
    - `tie_word_embeddings`: whether the head for masked tokens shares the embeddings' matrix, as ALBERT's does; it is
      then as narrow as the embeddings.

    Raises:
        ValueError: several layers are asked for, no pass, heads that do not divide `hidden_size`, or a negative
            `adapter_size`.

    Examples:
        >>> from mlp_fusion import MiniAlbertConfig
        >>> config = MiniAlbertConfig(num_hidden_layers=4)
        >>> config.adapter_size, config.embedding_size
        (48, 128)
    """

    model_type = "minialbert"

    vocab_size: int = 30522
    embedding_size: int = 128
    hidden_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: int | float = 0.1
    attention_probs_dropout_prob: int | float = 0.1
    adapter_size: int = 48
    tie_word_embeddings: bool = False

    def __post_init__(self, **options: Any) -> None:
        super().__post_init__(**options)
        if self.num_hidden_groups != 1 or self.inner_group_num != 1:
            raise ValueError("MiniALBERT has one layer: num_hidden_groups and inner_group_num are 1")
        if self.num_hidden_layers < 1:
            raise ValueError(f"num_hidden_layers {self.num_hidden_layers}: the layer is passed through 1 time or more")
        if self.hidden_size % self.num_attention_heads:
            # ALBERT's layer would be built, and its first pass fail.
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.adapter_size < 0:
            raise ValueError(f"adapter_size {self.adapter_size}: give a width, or 0 for no adapters")
        # Whoever has a config can build its model by the Auto classes; who has none pays for no import.
        importlib.import_module("mlp_fusion.minialbert.modeling")


AutoConfig.register(MiniAlbertConfig.model_type, MiniAlbertConfig, exist_ok=True)
