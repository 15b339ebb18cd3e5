"""Tiny configs, one for each way in which FFNs lie in a model of transformers, and what discovery finds in them."""

from __future__ import annotations

import functools
from typing import Any

from toy_transformer import ToyConfig
from transformers import CONFIG_MAPPING

from mlp_fusion.families.describe import describe
from mlp_fusion.families.sites import Description

BERT = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
LLAMA = {**BERT, "num_key_value_heads": 2}
_MOE = {**LLAMA, "moe_intermediate_size": 48, "num_experts_per_tok": 2, "head_dim": 16}
_T5 = {"vocab_size": 40, "d_model": 32, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 2}
_PART = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
#: Tiny configs: model type -> arguments.
TINY: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "gpt2": {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_inner": 96},
    "llama": LLAMA,
    "phi3": {**LLAMA, "pad_token_id": 0},
    "opt": {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 96,
            "word_embed_proj_dim": 32},
    "t5": {**_T5, "feed_forward_proj": "gated-gelu"},
    "modernbert": {**BERT, "pad_token_id": 0, "global_attn_every_n_layers": 2},
    "gpt_neox": BERT,
    "qwen3_moe": {**_MOE, "num_experts": 4, "mlp_only_layers": [0]},
    "gpt_oss": {**LLAMA, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {**LLAMA, "num_local_experts": 4},
    "deepseek_v3": {**_MOE, "head_dim": 8, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
                    "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8,
                    "v_head_dim": 16, "qk_nope_head_dim": 8},
    "vit": {**BERT, "image_size": 16, "patch_size": 8},
    "clip": {"text_config": {**_PART, "vocab_size": 40, "intermediate_size": 96},
             "vision_config": {**_PART, "intermediate_size": 128, "image_size": 16, "patch_size": 8}},
    "albert": {**BERT, "embedding_size": 16, "num_hidden_layers": 3},
    "bloom": {"vocab_size": 40, "hidden_size": 32, "n_layer": 2, "n_head": 2},
    "bitnet": LLAMA,
    "switch_transformers": {**_T5, "num_decoder_layers": 2, "num_experts": 3,
                            "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "gemma3n_text": {"vocab_size": 40, "vocab_size_per_layer_input": 40, "hidden_size": 32, "intermediate_size": 96,
                     "hidden_size_per_layer_input": 8, "num_hidden_layers": 4, "num_attention_heads": 2,
                     "num_key_value_heads": 1, "head_dim": 16, "num_kv_shared_layers": 0, "laurel_rank": 4,
                     "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0],
                     "layer_types": ["full_attention"] * 4},
}  # fmt: skip


@functools.cache
def tiny(model_type: str) -> Description:
    """What is found in a tiny model of a type."""
    return describe(CONFIG_MAPPING[model_type](**TINY[model_type]))


@functools.cache
def toy(layout: str) -> Description:
    """What is found in the toy Transformer."""
    return describe(ToyConfig(layout=layout))
