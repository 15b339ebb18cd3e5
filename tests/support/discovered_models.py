"""Small real models, one for each way in which FFNs that discovery finds are served."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor
from tying import tie

from families import token_batch
from mlp_fusion.store.record import architecture_of

_SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 40, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_BLOCKS = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 2}
_HALVES: dict[str, Any] = {
    "vocab_size": 97, "d_model": 32, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    "decoder_start_token_id": 2,
}  # fmt: skip
_ROUTED = {**_GROUPED, "num_experts_per_tok": 2}
#: Config class -> form of its first kind of FFN, and the config's arguments.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # FFNs that are modules of their own: plain and gated, with biases and without, with keys of several names.
    "GPTNeoXConfig": ("module", _SIZES),
    "PhiConfig": ("module", _SIZES),
    "Starcoder2Config": ("module", _GROUPED),
    "Gemma3TextConfig": ("module", {**_GROUPED, "head_dim": 8}),
    "Olmo2Config": ("module", _SIZES),
    "NemotronConfig": ("module", _GROUPED),
    "GPTJConfig": ("module", {**_BLOCKS, "rotary_dim": 4, "n_positions": 40}),
    "ImageGPTConfig": ("module", {**_BLOCKS, "n_positions": 40, "n_inner": 64}),
    # Gate and up in one projection; an FFN that lies in the layer; a dropout inside.
    "Phi3Config": ("activation", _SIZES),
    "Glm4Config": ("activation", {**_GROUPED, "head_dim": 8}),
    "ModernBertConfig": ("activation", {**_SIZES, "cls_token_id": 0, "sep_token_id": 2, "mlp_dropout": 0.1}),
    "OPTConfig": ("activation", {**_SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "ElectraConfig": ("activation", {**_SIZES, "embedding_size": 32}),
    "FalconConfig": ("activation", {**_SIZES, "ffn_hidden_size": 64}),
    # One FFN in all layers; no key that states its width; an encoder and a decoder, with one key and with two.
    "AlbertConfig": ("activation", {**_SIZES, "embedding_size": 32}),
    "BloomConfig": ("activation", {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 1}),
    "T5Config": ("activation", {**_HALVES, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
                                "feed_forward_proj": "gated-gelu"}),
    "BartConfig": ("activation", {**_HALVES, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
                                  "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
                                  "max_position_embeddings": 40}),
    # The activation is a function that no module holds.
    "EsmConfig": ("projection", {**_SIZES, "position_embedding_type": "rotary", "mask_token_id": 3}),
    # Stacks of experts: as `FusedExperts` has them, beside a dense layer; transposed, with gate and up in turns.
    "Qwen3MoeConfig": ("experts", {**_ROUTED, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 64,
                                   "mlp_only_layers": [0]}),
    "GptOssConfig": ("weights", {**_ROUTED, "head_dim": 8, "num_local_experts": 4}),
}  # fmt: skip
#: Families without a form for SGD-like optimisers.
ADAM_ONLY = ("EsmConfig",)
_MASKED = ("AlbertConfig", "ElectraConfig", "EsmConfig", "ModernBertConfig")
_SEQ2SEQ = ("BartConfig", "T5Config")


def auto(name: str) -> Any:
    """The class of a model with a head for tokens."""
    if name == "ImageGPTConfig":
        return transformers.ImageGPTForCausalImageModeling
    if name in _SEQ2SEQ:
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForMaskedLM if name in _MASKED else transformers.AutoModelForCausalLM


def model_of(name: str, **changes: Any) -> Any:
    """A small model, in evaluation mode; `changes` go into its config."""
    config = getattr(transformers, name)(**{**MODELS[name][1], **changes})
    torch.manual_seed(0)
    cls = auto(name)
    model = cls(config) if name == "ImageGPTConfig" else cls.from_config(config)
    # Fresh models start with zero biases and tiny weights, under which mistakes hide.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif parameter.std() < 0.1:
                parameter.mul_(4.0)
    return model.eval()


def tied(name: str, **changes: Any) -> Any:
    """A model whose FFNs hold every neuron twice: they can be halved without loss."""
    model = model_of(name, **changes)
    sites = [
        SimpleNamespace(
            path=site.path, projections=site.kind.projections, width=site.kind.width, group=site.kind.group,
            instances=[(site.path, site.index)], width_keys=[] if site.kind.key is None else [site.kind.key],
        )
        for site in architecture_of(model.config).sites(model)
    ]  # fmt: skip
    tie(model, SimpleNamespace(sites=sites))  # type: ignore[arg-type]
    return model


def batch_of(model: Any) -> dict[str, Tensor]:
    """Token ids, and labels, from which decoders make their inputs."""
    batch = token_batch()
    return {**batch, "labels": batch["input_ids"]}


def logits(model: Any) -> Tensor:
    """What a model makes of them."""
    with torch.no_grad():
        found: Tensor = model(**batch_of(model)).logits
    return found


def fused_ffns(model: Any) -> list[Any]:
    """The modules that hold a scale, in order."""
    architecture = architecture_of(model.config)
    return [found for site in architecture.sites(model) if (found := architecture.fused(site)) is not None]
