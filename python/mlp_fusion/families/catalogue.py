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
from mlp_fusion.minialbert.configuration import MiniAlbertConfig

#: Activations by name: those of the kernels, and further ones that FFNs of transformers have. Compared in this order.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: activation.function for name, activation in KERNELS.items()},
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


_ROPE = {
    "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
    }
}
_SPARSE = {"mlp_layer_types": ["dense"] + ["sparse"] * 31, "num_experts_per_tok": 6}
_EXPERTS = {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}
_NO_HEADS = "the number or the width of heads has no default"
_NO_LENGTH = "the length of predictions has no default"
_NO_ROPE = "rotary embeddings have no default"
_NO_EXPERTS = "experts have no defaults"
_NO_DROPOUT = "a dropout that is read has no default"
_NO_WORDS = "the vocabulary has no default"

#: By model type; for tests, for the benchmark and for `mlp-fusion families TYPE`.
DEFAULTS: dict[str, Arguments] = {
    "autoformer": Arguments({"prediction_length": 24}, _NO_LENGTH),
    "aya_vision": Arguments(
        {"vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16, "hidden_size": 1152}},
        "14 heads do not divide 1,152",
    ),
    "chameleon": Arguments({"vocabulary_map": {"<image>": 8711}}, _NO_WORDS),
    "cohere_compass": Arguments({"text_config": _ROPE}, _NO_ROPE),
    "cohere_compass_text": Arguments(_ROPE, _NO_ROPE),
    "dbrx": Arguments({"attn_config": {"rope_theta": 10000.0}}, _NO_ROPE),
    "deepseek_ocr2": Arguments({"text_config": _SPARSE}, _NO_EXPERTS),
    "deepseek_ocr2_text": Arguments(_SPARSE, _NO_EXPERTS),
    "diffusion_gemma": Arguments({"text_config": _EXPERTS}, _NO_EXPERTS),
    "diffusion_gemma_text": Arguments(_EXPERTS, _NO_EXPERTS),
    "dots1": Arguments({"n_shared_experts": 2, "n_routed_experts": 128}, _NO_EXPERTS),
    "emu3": Arguments({"vocabulary_map": {"<image>": 8711}}, _NO_WORDS),
    "esm": Arguments({"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32}, _NO_WORDS),
    "hunyuan_v1_dense": Arguments({"head_dim": 128}, _NO_HEADS),
    "hunyuan_v1_moe": Arguments({"head_dim": 128}, _NO_HEADS),
    "hunyuan_vl": Arguments({"text_config": {"head_dim": 128}}, _NO_HEADS),
    "hunyuan_vl_text": Arguments({"head_dim": 128}, _NO_HEADS),
    "informer": Arguments({"prediction_length": 24}, _NO_LENGTH),
    "lfm2_moe": Arguments({"layer_types": ["conv", "full_attention"] * 16}, "the kinds of layers have no default"),
    "ministral": Arguments({"head_dim": 128}, _NO_HEADS),
    "moonshine_streaming": Arguments({"num_key_value_heads": 8}, _NO_HEADS),
    "nemotron": Arguments({"num_key_value_heads": 8}, _NO_HEADS),
    "qwen3_omni_moe_talker_text": Arguments({"shared_expert_intermediate_size": 768}, _NO_EXPERTS),
    "t5gemma2_decoder": Arguments({"dropout_rate": 0.0}, _NO_DROPOUT),
    "t5gemma2_encoder": Arguments({"text_config": {"dropout_rate": 0.0}}, _NO_DROPOUT),
    "t5gemma2_text": Arguments({"dropout_rate": 0.0}, _NO_DROPOUT),
    "time_series_transformer": Arguments({"prediction_length": 24}, _NO_LENGTH),
}

#: (parameter, what stands there), in front of what the probe saw; the first that is found in a parameter's name counts.
#: They explain a refusal and make none: a parameter that is proved is never looked up.
KNOWN_REFUSALS: tuple[tuple[str, str], ...] = (
    (r"\.mixer\.|\.mamba(_decoder)?\.|mamba_block", "a state-space layer, whose channels are its state's"),
    (r"shared_transformer\.feed_forward", "a shared FFN into which each use adds an adapter of its own"),
    (
        r"(ffn|mlp|feed_forward)\.(ffn_)?(sub_norm|layernorm|norm)|ffn_layernorm",
        "a norm inside an FFN, over its neurons",
    ),
    (r"batch_norm|\.bn\d?\.", "a batch norm inside an FFN, whose statistics would have to be narrowed too"),
    (r"bias_integer|weight_integer|scaling_factor", "an integer copy of weights that is saved beside them"),
)


def model_types() -> list[str]:
    """Every model type of transformers, and MiniALBERT, sorted."""
    from transformers import CONFIG_MAPPING

    return sorted({*CONFIG_MAPPING.keys(), MiniAlbertConfig.model_type})


def default_config(model_type: str) -> Any:
    """The default config of a model type, with the arguments above where it needs some.

    Raises:
        InputError: transformers has no such type, or its config has no defaults.
    """
    from transformers import CONFIG_MAPPING

    if model_type == MiniAlbertConfig.model_type:
        return MiniAlbertConfig()
    if model_type not in CONFIG_MAPPING:
        raise InputError(f"{model_type}: neither a folder nor a model type of transformers")
    extra = DEFAULTS[model_type].arguments if model_type in DEFAULTS else {}
    try:
        return CONFIG_MAPPING[model_type](**copy.deepcopy(dict(extra)))
    except Exception as error:
        message = " ".join(str(error).split())
        raise InputError(f"{model_type}: its config has no defaults: {type(error).__name__}: {message}") from error
