"""Inputs of parts of models that stand for no text, image or sound: what another part puts out, by the type of it.

Here is what neither the names of arguments nor numbers of a config tell. Everything that a rule can say is in
`guesses`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

#: Draws normally distributed numbers of a shape.
Draw = Callable[..., Tensor]
_WORDS, _PATCHES, _SIDE = 16, 4, 8


def odd_guesses(config: Any, g: torch.Generator) -> Iterator[dict[str, Any]]:
    """Inputs of the model that `config` describes, where its type is one of those below."""
    made = _BY_TYPE.get(str(getattr(config, "model_type", "")))
    if made is not None:
        yield made(config, lambda *shape: torch.randn(shape, generator=g))


def _blt_encoder(config: Any, draw: Draw) -> dict[str, Any]:
    # Every four bytes are a patch; the number of patches is an integer, which a tensor of one entry can stand for.
    return {
        "inputs_embeds": draw(1, _WORDS, config.hidden_size),
        "patch_ids": torch.arange(_WORDS)[None] // (_WORDS // _PATCHES),
        "num_patches": torch.tensor([_PATCHES]),
    }


def _blt_decoder(config: Any, draw: Draw) -> dict[str, Any]:
    return {
        "inputs_embeds": draw(1, _WORDS, config.hidden_size),
        "patch_embeds": draw(1, _PATCHES, config.hidden_size_global),
    }


def _deepseek_ocr2_encoder(config: Any, draw: Draw) -> dict[str, Any]:
    # Patches, and behind them as many queries.
    return {"inputs_embeds": draw(1, _WORDS, config.hidden_size), "num_patches": torch.tensor([_WORDS // 2])}


def _dia_decoder(config: Any, draw: Draw) -> dict[str, Any]:
    return {
        "input_ids": torch.arange(_WORDS * config.num_channels).reshape(1, _WORDS, -1) % 20 + 20,
        "encoder_hidden_states": draw(1, 12, config.cross_hidden_size),
    }


def _dots3_note_audio(config: Any, draw: Draw) -> dict[str, Any]:
    # As many samples as 128 frames have.
    return {
        "input_features": draw(2, config.feature_size, 128),
        "chunk_sample_lengths": torch.full((2,), 128 * config.hop_length),
    }


def _higgs_audio_v2(config: Any, draw: Draw) -> dict[str, Any]:
    # Half of the text stands for frames of sound, which are several ids each.
    frames = _WORDS // 2
    ids = torch.arange(_WORDS)[None] + 20
    ids[:, :frames] = config.audio_token_id
    return {
        "input_ids": ids,
        "audio_input_ids": torch.arange(frames * config.num_codebooks).reshape(1, frames, -1) % 20 + 20,
        "audio_input_ids_mask": torch.ones(1, frames, dtype=torch.bool),
    }


def _colqwen2(config: Any, draw: Draw) -> dict[str, Any]:
    # Without tokens that stand for its image it runs too, as the model that it is the head of does not.
    vision, side = config.vlm_config.vision_config, 8
    numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    ids = torch.arange(_WORDS)[None] + 20
    images = torch.full((1, (side // vision.spatial_merge_size) ** 2), config.vlm_config.image_token_id)
    return {
        "input_ids": torch.cat([images, ids], 1),
        "mm_token_type_ids": torch.cat([torch.ones_like(images), torch.zeros_like(ids)], 1),
        "pixel_values": draw(1, side**2, numbers),
        "image_grid_thw": torch.tensor([[1, side, side]]),
    }


def _inkling2_vision(config: Any, draw: Draw) -> dict[str, Any]:
    # Parts of an image that are a token each.
    side = config.patch_size * config.spatial_merge_size
    return {
        "pixel_values": draw(16, side, side, config.num_channels),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def _jev(config: Any, draw: Draw) -> dict[str, Any]:
    # Two questions of two options each, in a text of ids that are not special.
    return {
        "input_ids": torch.arange(_WORDS)[None] + 20,
        "marks": torch.tensor([[4, 9]]),
        "num_options": torch.tensor([[2, 2]]),
        "question_type_ids": torch.tensor([[0, 0]]),
    }


def _muse_glimmer_assistant(config: Any, draw: Draw) -> dict[str, Any]:
    # Hidden states of several layers of the large model, side by side.
    return {
        "noise_embeds": draw(1, config.block_size, config.hidden_size),
        "context_hidden_states": draw(1, _WORDS, config.hidden_size * len(config.target_layer_ids)),
    }


def _phi4_audio(config: Any, draw: Draw) -> dict[str, Any]:
    return {"hidden_states": draw(1, 64, config.input_size), "mask": torch.ones(1, 64, dtype=torch.bool)}


def _sam3_detr_encoder(config: Any, draw: Draw) -> dict[str, Any]:
    # A list of maps, of one level: a tensor counts its first axis as a list does.
    level = (1, 1, config.hidden_size, _SIDE, _SIDE)
    return {
        "vision_features": draw(*level),
        "vision_pos_embeds": draw(*level),
        "text_features": draw(1, _WORDS, config.hidden_size),
    }


def _qwen2_5_omni_dit(config: Any, draw: Draw) -> dict[str, Any]:
    # A spectrum with noise, that of a speaker, and codes, of which each is some frames.
    return {
        "hidden_states": draw(1, 2 * config.block_size, config.mel_dim),
        "condition_vector": draw(1, 2 * config.block_size, config.mel_dim),
        "speaker_embedding": draw(1, 2 * config.block_size, config.enc_emb_dim),
        "quantized_code": torch.arange(2 * config.block_size // config.repeats)[None] + 20,
        "time_step": torch.tensor([0.5]),
    }


def _seggpt(config: Any, draw: Draw) -> dict[str, Any]:
    # The prompt is an image and its mask, each half as high as both together.
    height, width = config.image_size
    names = ("pixel_values", "prompt_pixel_values", "prompt_masks")
    return {name: draw(1, config.num_channels, height // 2, width) for name in names}


def _unlimited_ocr_vision(config: Any, draw: Draw) -> dict[str, Any]:
    return {"patch_embeds": draw(1, config.hidden_size, _SIDE, _SIDE)}


def _voxtral_text(config: Any, draw: Draw) -> dict[str, Any]:
    # Its class takes the embedded time among the arguments that it does not name.
    return {"inputs_embeds": draw(1, _WORDS, config.hidden_size), "t_cond": draw(1, 1, config.hidden_size)}


def _xcodec2(config: Any, draw: Draw) -> dict[str, Any]:
    # A wave, and as many frames of its spectrum.
    bins = config.semantic_model_config.feature_projection_input_dim
    return {"input_values": draw(1, 1, _WORDS * config.hop_length), "input_features": draw(1, _WORDS, bins)}


_BY_TYPE: dict[str, Callable[[Any, Draw], dict[str, Any]]] = {
    "blt_local_encoder": _blt_encoder,
    "blt_local_decoder": _blt_decoder,
    "deepseek_ocr2_encoder": _deepseek_ocr2_encoder,
    "dia_decoder": _dia_decoder,
    "dots3_note_audio_encoder": _dots3_note_audio,
    "higgs_audio_v2": _higgs_audio_v2,
    "colqwen2": _colqwen2,
    "inkling2_vision": _inkling2_vision,
    "jev": _jev,
    "muse_glimmer_assistant": _muse_glimmer_assistant,
    "phi4_multimodal_audio": _phi4_audio,
    "qwen2_5_omni_dit": _qwen2_5_omni_dit,
    "sam3_detr_encoder": _sam3_detr_encoder,
    "sam3_lite_text_detr_encoder": _sam3_detr_encoder,
    "seggpt": _seggpt,
    "unlimited_ocr_vision_encoder": _unlimited_ocr_vision,
    "voxtral_realtime_text": _voxtral_text,
    "neucodec": _xcodec2,
    "xcodec2": _xcodec2,
}
