"""A tiny classifier for companions: its biases are not zero, as those of a trained model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertConfig

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 90,
}
IDS = torch.tensor([[5, 9, 2, 40, 71, 3], [7, 7, 33, 80, 0, 0]])


def classifier(**changes: Any) -> Any:
    """A BERT classifier in evaluation mode."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(BertConfig(**{**_SIZES, **changes}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0.0, 0.02)
    return model.eval()


def attached(model: Any, config: Any, size: float = 0.5) -> Any:
    """A copy of `model` with a companion whose parameters are not those of the start any more."""
    from peft import get_peft_model

    made = get_peft_model(copy.deepcopy(model), config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return made


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found
