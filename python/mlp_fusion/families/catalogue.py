"""What discovery cannot know: names of activations, configs that need arguments, better words for known refusals.

Nothing here decides what is found or where: a family that is missing here is found all the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fusion_kernels.activations import ACTIVATIONS as KERNELS
from mlp_fusion.errors import InputError

#: Activations by name: those of the kernels, and further ones that FFNs of transformers have. Compared in this order.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: activation.function for name, activation in KERNELS.items()},
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.01),
    "elu": F.elu,
    "softplus": F.softplus,
    "gelu_10": lambda z: F.gelu(z).clamp(-10, 10),
    "identity": lambda z: z,
}


@dataclass(frozen=True)
class Arguments:
    """Arguments without which a default config builds no model. Users' configs have them.

    Attributes:
        arguments: of the config's class.
        reason: what goes wrong without.
    """

    arguments: Mapping[str, Any]
    reason: str


#: By model type; for tests, for the benchmark and for `mlp-fusion families TYPE`.
DEFAULTS: dict[str, Arguments] = {
    "autoformer": Arguments({"prediction_length": 24}, "the length has no default"),
    "cohere_compass_text": Arguments(
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
        "rotary embeddings by kind of attention have no default"),
    "dbrx": Arguments({"attn_config": {"rope_theta": 10000.0}}, "the angle of rotary embeddings has no default"),
    "deepseek_ocr2_text": Arguments({"mlp_layer_types": ["dense"] + ["sparse"] * 11}, "the list has no default"),
    "dots1": Arguments({"n_shared_experts": 2, "n_routed_experts": 128}, "numbers of experts have no default"),
    "esm": Arguments({"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32}, "the vocabulary has no default"),
    "hunyuan_v1_dense": Arguments({"head_dim": 128}, "the heads' width has no default"),
    "hunyuan_v1_moe": Arguments({"head_dim": 128}, "the heads' width has no default"),
    "hunyuan_vl_text": Arguments({"head_dim": 128}, "the heads' width has no default"),
    "informer": Arguments({"prediction_length": 24}, "the length has no default"),
    "lfm2_moe": Arguments({"layer_types": ["conv", "full_attention"] * 16}, "the kinds of layers have no default"),
    "ministral": Arguments({"head_dim": 128}, "the heads' width has no default"),
    "nemotron": Arguments({"head_dim": 128}, "the heads' width has no default"),
    "time_series_transformer": Arguments({"prediction_length": 24}, "the length has no default"),
}  # fmt: skip

#: (words of a reason, better words), in order; the first that fits is used.
KNOWN_REFUSALS: tuple[tuple[str, str], ...] = ()


def model_types() -> list[str]:
    """Every model type of transformers, sorted."""
    from transformers import CONFIG_MAPPING

    return sorted(CONFIG_MAPPING.keys())


def default_config(model_type: str) -> Any:
    """The default config of a model type, with the arguments above where it needs some.

    Raises:
        InputError: transformers has no such type, or its config has no defaults.
    """
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise InputError(f"{model_type}: neither a folder nor a model type of transformers")
    extra = DEFAULTS[model_type].arguments if model_type in DEFAULTS else {}
    try:
        return CONFIG_MAPPING[model_type](**copy.deepcopy(dict(extra)))
    except Exception as error:
        message = " ".join(str(error).split())
        raise InputError(f"{model_type}: its config has no defaults: {type(error).__name__}: {message}") from error
