"""Tiny models of every kind of input, with their FFNs, and batches as their processors return them."""

from __future__ import annotations

import dataclasses
import re
from collections import UserDict
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig

from mlp_fusion.families import Architecture, FFNSite
from mlp_fusion.store.record import architecture_of

_PART = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT = {**_PART, "vocab_size": 60, "intermediate_size": 96, "max_position_embeddings": 64}
_VISION = {**_PART, "intermediate_size": 128, "image_size": 16, "patch_size": 8}
_SIDES = {
    "vocab_size": 60, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
IMAGE_TOKEN = 59


@dataclass(frozen=True)
class Kind:
    """A tiny model's class, config, and a pattern of the layers whose FFNs are meant."""

    cls: str
    config: dict[str, Any]
    layers: str


KINDS: dict[str, Kind] = {
    "t5": Kind(
        "T5ForConditionalGeneration",
        {"model_type": "t5", "vocab_size": 60, "d_model": 32, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 2},
        r"encoder\.block\.\d\.layer\.1|decoder\.block\.\d\.layer\.2",
    ),
    "bart": Kind("BartModel", {"model_type": "bart", **_SIDES, "max_position_embeddings": 64}, r"\w+\.layers\.\d"),
    "whisper": Kind(
        "WhisperForConditionalGeneration",
        {"model_type": "whisper", **_SIDES, **_SPECIAL, "num_mel_bins": 8, "max_source_positions": 20,
         "max_target_positions": 24},
        r"model\.\w+\.layers\.\d",
    ),
    "vit": Kind("ViTForImageClassification", {"model_type": "vit", **_VISION}, r"vit\.layers\.\d"),
    "clip": Kind(
        "CLIPModel",
        {"model_type": "clip", "text_config": {**_TEXT, "eos_token_id": 2}, "vision_config": _VISION},
        r"\w+\.encoder\.layers\.\d",
    ),
    "wav2vec2": Kind(
        "Wav2Vec2ForCTC",
        {"model_type": "wav2vec2", **_PART, "vocab_size": 60, "intermediate_size": 64, "conv_dim": (16, 16),
         "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
         "num_conv_pos_embedding_groups": 2},
        r"wav2vec2\.encoder\.layers\.\d",
    ),
    "llava": Kind(
        "LlavaForConditionalGeneration",
        {"model_type": "llava", "text_config": {"model_type": "llama", **_TEXT, "num_key_value_heads": 2},
         "vision_config": {"model_type": "clip_vision_model", **_VISION}, "image_token_index": IMAGE_TOKEN},
        r"model\.vision_tower\.encoder\.layers\.\d",
    ),
    "llava's text": Kind(
        "LlavaForConditionalGeneration",
        {},
        r"model\.language_model\.layers\.\d",
    ),
    "qwen2_vl": Kind(
        "Qwen2VLForConditionalGeneration",
        {"model_type": "qwen2_vl",
         "text_config": {**_TEXT, "num_key_value_heads": 2,
                         "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
         "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4,
                           "mlp_ratio": 2},
         "image_token_id": IMAGE_TOKEN, "video_token_id": 58, "vision_start_token_id": 56, "vision_end_token_id": 57},
        r"model\.visual\.blocks\.\d",
    ),
    "xlnet": Kind(
        "XLNetModel",
        {"model_type": "xlnet", "vocab_size": 60, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64},
        r"layer\.\d",
    ),
    "albert": Kind(
        "AlbertModel",
        {"model_type": "albert", "vocab_size": 60, "hidden_size": 32, "embedding_size": 16, "num_hidden_layers": 3,
         "num_attention_heads": 2, "intermediate_size": 64},
        r"encoder\.albert_layer_groups\.0\.albert_layers\.0",
    ),
}  # fmt: skip


def tiny(kind: str, **extra: Any) -> Any:
    """A tiny model, in evaluation mode, with weights that are not next to nothing."""
    found = KINDS[kind.split("'")[0]]
    config = AutoConfig.for_model(**{**found.config, **extra})
    torch.manual_seed(0)
    model = getattr(transformers, found.cls)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.ndim == 2 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def ffns(kind: str, model: Any) -> tuple[Architecture, list[FFNSite]]:
    """Its FFNs, those at `layers`."""
    architecture = architecture_of(model.config)
    sites = [site for site in architecture.sites(model) if re.match(KINDS[kind].layers, site.path)]
    return architecture, [dataclasses.replace(site, index=number) for number, site in enumerate(sites)]


def text(seed: int, lengths: tuple[int, ...], width: int, side: str = "right") -> dict[str, Tensor]:
    """Token ids padded to `width`, with their mask."""
    ids = torch.randint(4, 50, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).long()
    mask = mask if side == "right" else mask.flip(1)
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def processed(kind: str, seed: int = 0) -> Any:
    """A batch of three samples as a processor returns it, with labels and a column of names."""
    g = torch.Generator().manual_seed(seed)
    kind = kind.split("'")[0]
    pixels = {"pixel_values": torch.randn(3, 3, 16, 16, generator=g)}
    found: dict[str, Any] = {
        "vit": lambda: pixels,
        "clip": lambda: {**text(seed, (5, 7, 2), 7), **pixels},
        "whisper": lambda: {"input_features": torch.randn(3, 8, 40, generator=g)},
        "wav2vec2": lambda: {
            "input_values": torch.randn(3, 400, generator=g),
            "attention_mask": (torch.arange(400) < torch.tensor([[400], [300], [200]])).long(),
        },
        # Images of 4 x 4, 2 x 4 and 4 x 2 patches, four of which make one token.
        "qwen2_vl": lambda: {
            "pixel_values": torch.randn(32, 96, generator=g),
            "image_grid_thw": torch.tensor([[1, 4, 4], [1, 2, 4], [1, 4, 2]]),
            **_of_unequal_images(text(seed, (9, 7, 8), 9)),
        },
        "llava": lambda: {**pixels, **_with_images(text(seed, (9, 7, 8), 9, "left"))},
    }.get(kind, lambda: text(seed, (5, 7, 2), 7))()
    return UserDict({**found, "labels": torch.zeros(3, 2), "names": ["a", "b", "c"]})


def _of_unequal_images(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A placeholder in front for each token of an image, and what says which they are."""
    for row, count in enumerate((4, 2, 2)):
        batch["input_ids"][row, :count] = IMAGE_TOKEN
    return {**batch, "mm_token_type_ids": (batch["input_ids"] == IMAGE_TOKEN).long()}


def _with_images(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Four placeholders at the end of each text."""
    batch["input_ids"][:, -4:] = IMAGE_TOKEN
    return batch
