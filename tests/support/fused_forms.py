"""A tiny fused model of each form in which a narrower FFN stands in its model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModel

from mlp_fusion import fuse

_SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "pad_token_id": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
#: All experts are chosen: a router that rounds otherwise chooses no other.
_EXPERTS = {**_SMALL, "num_key_value_heads": 2, "head_dim": 12, "num_experts_per_tok": 4}

#: Form -> a model type whose FFNs have it, and the arguments of its config.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "module": ("llama", {**_SMALL, "num_key_value_heads": 2}),
    "activation": ("bert", _SMALL),
    "projection": ("esm", {**_SMALL, "position_embedding_type": "rotary", "token_dropout": False}),
    "weights": ("gpt_oss", {**_EXPERTS, "num_local_experts": 4}),
    "experts": ("qwen3_moe", {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 48}),
}


def fused_model(form: str, optimizer: str = "adamw") -> Any:
    """A model whose FFNs are fused to half of their width, and have that form; in evaluation mode."""
    model_type, arguments = FORMS[form]
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIG_MAPPING[model_type](**arguments)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    fuse(model, 24, optimizer=optimizer, sample={"input_ids": tokens()})
    return model


def tokens() -> Tensor:
    """Token ids (8, 7)."""
    return torch.randint(3, 97, (8, 7), generator=torch.Generator().manual_seed(1))
