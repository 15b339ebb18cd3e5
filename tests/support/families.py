"""Tiny randomly initialised models, one per supported family, for the tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_GATED = {**_COMMON, "num_key_value_heads": 2, "head_dim": 6}

#: family -> (config class, its arguments, class for a sequence classification task)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", _COMMON),
    "roberta": ("RobertaConfig", _COMMON),
    "xlm-roberta": ("XLMRobertaConfig", _COMMON),
    "distilbert": (
        "DistilBertConfig",
        {"vocab_size": 97, "dim": 24, "n_layers": 3, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 40},
    ),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 97, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 40, "pad_token_id": 1},
    ),
    "llama": ("LlamaConfig", {**_GATED, "mlp_bias": True}),
    "mistral": ("MistralConfig", _GATED),
    "qwen2": ("Qwen2Config", _GATED),
    "qwen3": ("Qwen3Config", _GATED),
    "gemma": ("GemmaConfig", _GATED),
    "gemma2": ("Gemma2Config", _GATED),
}

#: width of every tiny FFN: GPT-2's comes from n_inner=None, four times its 16 hidden units
WIDTH = 64


def tiny_model(
    family: str,
    *,
    task: str = "SequenceClassification",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **extra: Any,
) -> PreTrainedModel:
    """A tiny model of `family`, in evaluation mode; `extra` goes into its config."""
    name, arguments = FAMILIES[family]
    config = getattr(transformers, name)(**{**arguments, **extra})
    torch.manual_seed(seed)
    if task == "Model":
        model = transformers.AutoModel.from_config(config)
    else:
        model = getattr(transformers, f"AutoModelFor{task}").from_config(config)
    # Fresh models start with zero biases and tiny weights, under which mistakes hide.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(6.0)
    return model.to(dtype).eval()


def token_batch(seed: int = 0, batch: int = 4, length: int = 9) -> dict[str, torch.Tensor]:
    """Token ids with a ragged attention mask, and class labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}
