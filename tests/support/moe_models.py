"""Small Mixture-of-Experts models, one for each layout of those that people compress."""

from __future__ import annotations

from typing import Any

import torch
import transformers

_SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "num_experts_per_tok": 2, "max_position_embeddings": 40, "pad_token_id": 1,
    "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_ROUTED = {**_SIZES, "moe_intermediate_size": 32, "head_dim": 8}
_LATENT = {**_ROUTED, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1,
           "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8,
           "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}  # fmt: skip
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
           "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
#: Config class -> its arguments.
MOE_MODELS: dict[str, dict[str, Any]] = {
    "MixtralConfig": {**_SIZES, "num_local_experts": 4},
    "Qwen2MoeConfig": {**_ROUTED, "num_experts": 4, "shared_expert_intermediate_size": 64, "mlp_only_layers": [0]},
    "Qwen3MoeConfig": {**_ROUTED, "num_experts": 4, "mlp_only_layers": [0]},
    "Qwen3NextConfig": {**_ROUTED, **_LINEAR, "num_experts": 4, "shared_expert_intermediate_size": 64},
    "Qwen3_5MoeTextConfig": {**_ROUTED, **_LINEAR, "num_experts": 4, "shared_expert_intermediate_size": 64},
    "DeepseekV2Config": {**_LATENT, "topk_method": "group_limited_greedy"},
    "DeepseekV3Config": _LATENT,
    "Glm4MoeConfig": {**_ROUTED, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "OlmoeConfig": {**_SIZES, "num_experts": 4},
    "GptOssConfig": {**_SIZES, "head_dim": 8, "num_local_experts": 4},
    "Llama4TextConfig": {**_SIZES, "head_dim": 8, "intermediate_size_mlp": 128, "num_local_experts": 4,
                         "num_experts_per_tok": 1, "moe_layers": [1], "attention_chunk_size": 32},
    "GraniteMoeConfig": {**_SIZES, "num_local_experts": 4},
    "GraniteMoeSharedConfig": {**_SIZES, "num_local_experts": 4, "shared_intermediate_size": 64},
    "MiniMaxConfig": {**_SIZES, "head_dim": 8, "num_local_experts": 4, "block_size": 16,
                      "layer_types": ["linear_attention", "full_attention"]},
    "MiniMaxM2Config": {**_SIZES, "head_dim": 8, "num_local_experts": 4},
    "SwitchTransformersConfig": {
        "vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2,
        "num_heads": 4, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
        "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
    },
}  # fmt: skip


def moe_model(name: str, **changes: Any) -> Any:
    """A new small model, in evaluation mode; its weights are not tiny, as mistakes would hide behind them.

    `changes` go into its config.
    """
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**MOE_MODELS[name], **changes})
    seq2seq = config.is_encoder_decoder
    model = (transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.std() < 0.1:
                parameter.mul_(4.0)
    return model.eval()
