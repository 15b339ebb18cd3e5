"""The models of MiniALBERT, entered into the Auto classes.

They are transformers' own ALBERT but for what differs: the layer has adapters of each pass, the encoder has one layer
and passes through it again, and the state of the first token is what is classified.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.albert.modeling_albert import (
    AlbertAttention,
    AlbertEmbeddings,
    AlbertForMaskedLM,
    AlbertForSequenceClassification,
    AlbertForTokenClassification,
    AlbertLayer,
    AlbertMLMHead,
    AlbertModel,
    AlbertPreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.pytorch_utils import apply_chunking_to_forward

from mlp_fusion.errors import InputError
from mlp_fusion.minialbert.configuration import MiniAlbertConfig


class BottleneckAdapter(nn.Module):
    """`LayerNorm(x + W_up act(W_down x))`, with biases. Because of the norm it is no identity at the start."""

    def __init__(self, config: MiniAlbertConfig) -> None:
        super().__init__()
        self.down = nn.Linear(config.hidden_size, config.adapter_size)
        self.activation = ACT2FN[config.hidden_act]
        self.up = nn.Linear(config.adapter_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(..., hidden_size)` to the same shape."""
        result: Tensor = self.LayerNorm(hidden_states + self.up(self.activation(self.down(hidden_states))))
        return result


class PassAdapters(nn.Module):
    """The two adapters of one pass through the layer."""

    def __init__(self, config: MiniAlbertConfig) -> None:
        super().__init__()
        self.attention = BottleneckAdapter(config)
        self.ffn = BottleneckAdapter(config)


class MiniAlbertLayer(GradientCheckpointingLayer, AlbertLayer):
    """ALBERT's layer, with adapters of every pass: one before its attention, another before its FFN."""

    def __init__(self, config: MiniAlbertConfig) -> None:
        super().__init__(config)
        passes = config.num_hidden_layers if config.adapter_size else 0
        self.adapters = nn.ModuleList(PassAdapters(config) for _ in range(passes))

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, number: int = 0, **options: Any
    ) -> Tensor:
        """Pass `number`: `(batch, tokens, hidden_size)` to the same shape."""
        adapters: Any = self.adapters[number] if len(self.adapters) else None
        inputs = hidden_states if adapters is None else adapters.attention(hidden_states)
        attended, _ = self.attention(inputs, attention_mask, **options)
        attended = attended if adapters is None else adapters.ffn(attended)
        added = apply_chunking_to_forward(self.ff_chunk, self.chunk_size_feed_forward, self.seq_len_dim, attended)
        result: Tensor = self.full_layer_layer_norm(self.dropout(added) + attended)
        return result


class MiniAlbertEncoder(nn.Module):
    """The projection of the embeddings, and passes through the one layer as often as the config says."""

    def __init__(self, config: MiniAlbertConfig) -> None:
        super().__init__()
        self.passes = config.num_hidden_layers
        narrow = config.embedding_size != config.hidden_size
        self.projection = nn.Linear(config.embedding_size, config.hidden_size) if narrow else nn.Identity()
        # A list of one: that is where layers are looked for.
        self.layers = nn.ModuleList([MiniAlbertLayer(config)])

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any) -> BaseModelOutput:
        """Embeddings `(batch, tokens, embedding_size)` to states `(batch, tokens, hidden_size)`."""
        hidden_states = self.projection(hidden_states)
        for number in range(self.passes):
            hidden_states = self.layers[0](hidden_states, attention_mask, number=number, **options)
        return BaseModelOutput(last_hidden_state=hidden_states)


class MiniAlbertPreTrainedModel(AlbertPreTrainedModel):
    """What all models of MiniALBERT can do."""

    config: MiniAlbertConfig
    config_class = MiniAlbertConfig
    supports_gradient_checkpointing = True
    _can_record_outputs: ClassVar = {"hidden_states": MiniAlbertLayer, "attentions": AlbertAttention}

    def insert_adapters(self, size: int | None = None) -> None:
        """Give a model that has none adapters of every pass, drawn at random.

        Args:
            size: width of the bottlenecks; None for the paper's, a sixteenth of `hidden_size`.

        Raises:
            InputError: it has adapters already, or `size` is not positive.
        """
        size = max(1, self.config.hidden_size // 16) if size is None else size
        if self.config.adapter_size:
            raise InputError(f"the model has adapters of width {self.config.adapter_size} already")
        if size < 1:
            raise InputError(f"adapters of width {size}: give 1 or more")
        self.config.adapter_size = size
        layer, passes = self.base_model.encoder.layers[0], self.base_model.encoder.passes
        made = nn.ModuleList(PassAdapters(self.config) for _ in range(passes))
        made.to(layer.full_layer_layer_norm.weight.device, layer.full_layer_layer_norm.weight.dtype)
        made.apply(self._init_weights)
        layer.adapters.extend(made.train(self.training))

    def freeze_all_but_adapters(self) -> None:
        """Leave the adapters and the head to train; the shared layer, the embeddings and their projection stay.

        Raises:
            InputError: the model has no adapters.
        """
        if not self.config.adapter_size:
            raise InputError("the model has no adapters: call insert_adapters() first")
        self.base_model.requires_grad_(False)
        self.base_model.encoder.layers[0].adapters.requires_grad_(True)

    def _build_classifier(self) -> None:
        """The encoder and a classifier, of texts or of tokens."""
        self.num_labels = self.config.num_labels
        self.albert = MiniAlbertModel(self.config)
        self.dropout = nn.Dropout(self.config.classifier_dropout_prob)
        self.classifier = nn.Linear(self.config.hidden_size, self.config.num_labels)
        self.post_init()


class MiniAlbertModel(MiniAlbertPreTrainedModel, AlbertModel):
    """Embeddings and encoder. What it gives as `pooler_output` is the first token's state as it is.

    Args:
        config: its shape.

    Examples:
        >>> import torch
        >>> from mlp_fusion import MiniAlbertConfig, MiniAlbertModel
        >>> shape = {"vocab_size": 100, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
        >>> model = MiniAlbertModel(MiniAlbertConfig(**shape, adapter_size=2))
        >>> model(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
        torch.Size([1, 3, 32])
    """

    def __init__(self, config: MiniAlbertConfig, add_pooling_layer: bool = False) -> None:
        PreTrainedModel.__init__(self, config)  # ALBERT's would build its own encoder first
        self.embeddings = AlbertEmbeddings(config)
        self.encoder = MiniAlbertEncoder(config)
        self.pooler = nn.Identity()
        self.pooler_activation = nn.Identity()
        self.post_init()


class MiniAlbertMLMHead(AlbertMLMHead):
    """ALBERT's head, as wide as the embeddings where it shares their matrix, and otherwise as the states."""

    def __init__(self, config: MiniAlbertConfig) -> None:
        nn.Module.__init__(self)
        width = config.embedding_size if config.tie_word_embeddings else config.hidden_size
        self.dense = nn.Linear(config.hidden_size, width)
        self.activation = ACT2FN[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(width, config.vocab_size)


class MiniAlbertForMaskedLM(MiniAlbertPreTrainedModel, AlbertForMaskedLM):
    """MiniALBERT with a head for masked tokens.

    Args:
        config: its shape.

    Examples:
        >>> import torch
        >>> from transformers import AutoModelForMaskedLM
        >>> from mlp_fusion import MiniAlbertConfig
        >>> shape = {"vocab_size": 100, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
        >>> model = AutoModelForMaskedLM.from_config(MiniAlbertConfig(**shape, adapter_size=2))
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 100])
    """

    _tied_weights_keys: ClassVar = {"predictions.decoder.weight": "albert.embeddings.word_embeddings.weight"}

    def __init__(self, config: MiniAlbertConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.albert = MiniAlbertModel(config)
        self.predictions = MiniAlbertMLMHead(config)
        self.post_init()

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Put another projection to the vocabulary in its place, as resizing does."""
        self.predictions.decoder = new_embeddings


class MiniAlbertForSequenceClassification(MiniAlbertPreTrainedModel, AlbertForSequenceClassification):
    """MiniALBERT that classifies a text by its first token's state, or gives it a number (`num_labels=1`).

    Args:
        config: its shape.

    Examples:
        >>> import torch
        >>> from mlp_fusion import MiniAlbertConfig, MiniAlbertForSequenceClassification
        >>> shape = {"vocab_size": 100, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
        >>> model = MiniAlbertForSequenceClassification(MiniAlbertConfig(**shape, adapter_size=2, num_labels=3))
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3])
    """

    def __init__(self, config: MiniAlbertConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self._build_classifier()


class MiniAlbertForTokenClassification(MiniAlbertPreTrainedModel, AlbertForTokenClassification):
    """MiniALBERT that classifies tokens.

    Args:
        config: its shape.

    Examples:
        >>> import torch
        >>> from mlp_fusion import MiniAlbertConfig, MiniAlbertForTokenClassification
        >>> shape = {"vocab_size": 100, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
        >>> model = MiniAlbertForTokenClassification(MiniAlbertConfig(**shape, adapter_size=2, num_labels=3))
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 3])
    """

    def __init__(self, config: MiniAlbertConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self._build_classifier()


AutoModel.register(MiniAlbertConfig, MiniAlbertModel, exist_ok=True)
AutoModelForMaskedLM.register(MiniAlbertConfig, MiniAlbertForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(MiniAlbertConfig, MiniAlbertForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(MiniAlbertConfig, MiniAlbertForTokenClassification, exist_ok=True)
