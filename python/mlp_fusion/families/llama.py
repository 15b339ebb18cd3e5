"""Llama and the dense gated families with its layout: Mistral, Qwen2, Qwen3, Gemma, Gemma 2."""

from mlp_fusion.families.base import Architecture


def _entry(model_type: str, layer_class: str, activation_key: str = "hidden_act") -> Architecture:
    return Architecture(
        model_types=(model_type,),
        base="model",
        layers="layers",
        module="mlp",
        projections={"w_gate": "mlp.gate_proj", "w_in": "mlp.up_proj", "w_out": "mlp.down_proj"},
        layer_class=f"transformers.models.{model_type}.modeling_{model_type}:{layer_class}",
        activation_key=activation_key,
    )


ENTRIES = (
    _entry("llama", "LlamaDecoderLayer"),
    _entry("mistral", "MistralDecoderLayer"),
    _entry("qwen2", "Qwen2DecoderLayer"),
    _entry("qwen3", "Qwen3DecoderLayer"),
    _entry("gemma", "GemmaDecoderLayer"),
    _entry("gemma2", "Gemma2DecoderLayer", activation_key="hidden_activation"),
)
