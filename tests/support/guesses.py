"""Guesses at the inputs of any model, by the names of what its `forward` takes and by numbers of its config.

Values are random, since outputs are compared. What the product guesses while it looks for FFNs is in
`mlp_fusion.families.recording`; there only the way to a layer counts.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from odd_guesses import odd_guesses
from torch import Tensor

from mlp_fusion.families.inputs import guessed_series

_TOKENS, _SAMPLES = 16, 15360
#: Ids that are rarely special.
LEAST_ID, MOST_ID = 20, 40
_PARTS = (
    "text_config", "vision_config", "audio_config", "backbone_config", "encoder", "decoder", "thinker_config",
    "language_config", "decoder_config", "encoder_config", "speech_config", "vision_encoder_config",
    "audio_encoder_config", "image_encoder", "vlm_config", "codec_config",
)  # fmt: skip
Inputs = dict[str, Any]


def guesses(model: Any) -> Iterator[Inputs]:
    """Guesses at a model's inputs, the fullest first."""
    names = {
        name: p
        for name, p in inspect.signature(model.forward).parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    config = model.config
    g = torch.Generator().manual_seed(0)
    yield from odd_guesses(config, torch.Generator().manual_seed(1))
    text = _text(names, config, g)
    images = list(itertools.islice(_images(names, config, g), 24)) if "pixel_values" in names else []
    if "image" in names and not images:
        images = [{"image": image["pixel_values"]} for image in _images(names, config, g)][:8]
    first = next((name for name, p in names.items() if p.default is p.empty), None)
    videos = list(itertools.islice(_videos(names, config, g), 8))
    sounds = list(itertools.islice(_sounds(names, config, g), 24))
    main = model.main_input_name if isinstance(model.main_input_name, str) else ""
    if not text or (main in ("input_features", "input_values")):
        yield from ({**_decoders(text), **sound} for sound in sounds)
    if "input_values" in names and "input_features" in names:
        waves = [sound for sound in sounds if "input_values" in sound]
        yield from ({**a, **b} for a in waves for b in sounds if "input_features" in b)
    if images and sounds:
        yield from ({**text, **a, **b} for a, b in itertools.product(images[:6], sounds[:6]))
    yield from ({**text, **image} for image in images)
    for sound in sounds:
        # Some read a text instead of the sound, where both are given.
        if _decoders(text) and "input_ids" in text:
            yield {**_decoders(text), **sound}
        yield {**text, **sound}
    yield from ({**text, **video} for video in videos)
    yield from _others(names, config, g, text)
    if "query_embeds" in names and "input_ids" in text:
        yield from ({**text, **queries} for queries in _hidden(names, config, g) if "query_embeds" in queries)
    if text:
        codebooks = next(numbers(config, "num_codebooks", "num_channels", "n_codebooks"), 0)
        if codebooks and "pixel_values" not in names:
            main_ids = "decoder_input_ids" if "decoder_input_ids" in text else "input_ids"
            yield {
                **text,
                main_ids: text[main_ids][..., None].expand(1, _TOKENS, codebooks) if main_ids in text else None,
            }
        yield text
        yield {name: value for name, value in text.items() if name.endswith("input_ids")}
    yield from ({**_decoders(text), **image} for image in images if text)
    yield from _hidden(names, config, g)
    if first == "hidden_states" and main == "input_values":
        channels = next(numbers(config, "channels", "num_channels"), 1)
        yield {first: torch.randn(1, channels, _SAMPLES, generator=g)}
    if first == "hidden_states":
        found = (image["pixel_values"] for image in _images(names, config, g) if "pixel_values" in image)
        yield from ({first: pixels} for pixels in itertools.islice(found, 4))


def _decoders(text: Inputs) -> Inputs:
    return {name: value for name, value in text.items() if name.startswith("decoder")}


def numbers(config: Any, *names: str) -> Iterator[int]:
    """What a config and its parts say under any of `names`; of lists, the first entry."""
    parts = [config, *(part for key in _PARTS if (part := getattr(config, key, None)) is not None)]
    parts += [inner for part in parts[1:] for key in _PARTS if (inner := getattr(part, key, None)) is not None]
    for part in parts:
        for name in names:
            value = part.get(name) if isinstance(part, dict) else getattr(part, name, None)
            while isinstance(value, (list, tuple)) and value:
                value = value[0]
            if isinstance(value, dict):
                value = next(iter(value.values()), None)
            if type(value) is int:
                yield value


def _text(names: Mapping[str, Any], config: Any, g: torch.Generator) -> Inputs:
    words = next(numbers(config, "vocab_size"), MOST_ID)
    low, high = (LEAST_ID, MOST_ID) if words >= MOST_ID else (min(3, words - 1), words)

    def ids() -> Tensor:
        return torch.randint(low, high, (1, _TOKENS), generator=g)

    made = {
        name: ids()
        for name in names
        if re.fullmatch(r"(decoder_|qformer_|tasks_|protein_)?input_ids|task_inputs", name)
    }
    if "protein_attention_mask" in names:
        made["protein_attention_mask"] = torch.ones(1, _TOKENS, dtype=torch.long)
    if "task_inputs" in made:
        made["task_inputs"] = torch.randint(low, high, (1, next(numbers(config, "task_seq_len"), _TOKENS)), generator=g)
    if "cross_attention_states" in names:
        made["cross_attention_states"] = torch.randn(1, 8, next(numbers(config, "hidden_size"), 8), generator=g)
    if "moe_mm_token_type_ids" in names:
        made["moe_mm_token_type_ids"] = torch.arange(_TOKENS)[None] % 2
    if "visual_feats" in names:
        made["visual_feats"] = torch.randn(1, 4, next(numbers(config, "visual_feat_dim"), 8), generator=g)
        made["visual_pos"] = torch.rand(1, 4, next(numbers(config, "visual_pos_dim"), 4), generator=g)
    if "bbox" in names:
        made["bbox"] = torch.tensor([[[1, 2, 5, 6]]]).expand(1, _TOKENS, 4)
    return made


def _images(names: Mapping[str, Any], config: Any, g: torch.Generator) -> Iterator[Inputs]:
    channels = list(dict.fromkeys([*numbers(config, "num_channels", "in_channels", "in_chans"), 3]))
    sizes = list(dict.fromkeys([*numbers(config, "image_size", "crop_size", "img_size", "max_img_size"), 64, 224]))[:3]
    patches = list(dict.fromkeys([*numbers(config, "patch_size"), 14, 16]))
    patch = patches[0]
    if "grid_thw" in names or "image_grid_thw" in names or "grid_hw" in names or "image_grid_hw" in names:
        yield from _grids(names, config, g, "pixel_values", "image_grid_thw")
    if "spatial_shapes" in names or "pixel_position_ids" in names or "image_position_ids" in names:
        for p in patches[:2]:
            yield from _patch_lists(names, channels[0], p, g)
    pair = getattr(config, "image_size", None)
    if isinstance(pair, (list, tuple)) and len(pair) == 2:
        yield {"pixel_values": torch.randn(1, channels[0], *pair, generator=g)}
    for c, size in itertools.product(channels[:2], sizes):
        pixels = torch.randn(1, c, size, size, generator=g)
        yield {"pixel_values": pixels}
        yield _beside_pixels(names, config, pixels, size)
        if "target_sizes" in names:
            yield {"pixel_values": pixels, "target_sizes": torch.tensor([[size // patch, size // patch]])}
    tiled = {"image_sizes", "pixel_attention_mask", "num_tiles", "image_attention_mask"} & names.keys()
    for size, tiles in itertools.product(sizes, (1, 2, 3, 5)) if tiled else ():
        if "pixel_attention_mask" in names and tiles < 3:
            several = torch.randn(1, tiles, channels[0], size, size, generator=g)
            yield {"pixel_values": several, "pixel_attention_mask": torch.ones(1, tiles, dtype=torch.bool)}
        yield _beside_pixels(names, config, torch.randn(1, tiles, channels[0], size, size, generator=g), size)
    for size in sizes if "aspect_ratio_ids" in names else ():
        tiles = next(numbers(config, "max_num_tiles"), 4)
        yield {
            "pixel_values": torch.randn(1, 1, tiles, channels[0], size, size, generator=g),
            "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(1, 1, tiles, dtype=torch.long),
        }
    for frames, size in itertools.product(dict.fromkeys(numbers(config, "num_frames", "frames_per_clip")), sizes[:1]):
        yield {"pixel_values": torch.randn(1, frames, channels[0], size, size, generator=g)}
        yield {"pixel_values": torch.randn(frames, channels[0], size, size, generator=g)}
    size = sizes[0]
    yield {"pixel_values": torch.randn(1, 2, channels[0], size, size, generator=g)}
    yield {"pixel_values": torch.randn(1, 16, channels[0], size, size, generator=g)}
    yield {"pixel_values": torch.randn(4, channels[0] * patch * patch, generator=g)}
    yield {"pixel_values": torch.randn(1, (size // patch) ** 2, channels[0] * patch * patch, generator=g)}


def _beside_pixels(names: Mapping[str, Any], config: Any, pixels: Tensor, size: int) -> Inputs:
    made: Inputs = {"pixel_values": pixels}
    if "pixel_mask" in names:
        made["pixel_mask"] = torch.ones(pixels.shape[0], size, size, dtype=torch.long)
    if "pixel_attention_mask" in names and pixels.dim() == 5:
        made["pixel_attention_mask"] = torch.ones(*pixels.shape[:2], size, size, dtype=torch.bool)
    if "image_attention_mask" in names and pixels.dim() == 5:
        made["image_attention_mask"] = torch.ones(1, _TOKENS, pixels.shape[1], dtype=torch.long)
    if "high_res_pixel_values" in names:
        high = getattr(getattr(config, "high_res_vision_config", None), "image_size", size)
        made["high_res_pixel_values"] = torch.ones(1, 3, high, high)
    if "image_sizes" in names:
        made["image_sizes"] = torch.tensor([[size, size]])
    if "target_sizes" in names:
        made["target_sizes"] = torch.tensor([[size, size]])
    return made


def _grids(names: Mapping[str, Any], config: Any, g: torch.Generator, pixels: str, grid: str) -> Iterator[Inputs]:
    """Patches one after another, with the grid that they are on."""
    channels = next(numbers(config, "in_channels", "num_channels", "in_chans"), 3)
    for patch, times in itertools.product(
        dict.fromkeys([*numbers(config, "patch_size", "spatial_patch_size"), 14, 16]),
        dict.fromkeys([*numbers(config, "temporal_patch_size"), 1, 2]),
    ):
        flat = torch.randn(64, channels * times * patch * patch, generator=g)
        maps = flat.reshape(64, channels, patch, patch) if times == 1 else None
        for values in (flat, maps, flat[None], None if maps is None else maps[None]):
            if values is None:
                continue
            made: Inputs = {pixels if pixels in names else "hidden_states": values}
            for name in names:
                if name in (grid, "grid_thw"):
                    made[name] = torch.tensor([[1, 8, 8]])
                elif name in ("grid_hw", "image_grid_hw"):
                    made[name] = torch.tensor([[8, 8]])
                elif name in ("merge_sizes", "image_merge_sizes"):
                    made[name] = torch.tensor([2])
            if "mm_token_type_ids" in names:
                made["mm_token_type_ids"] = torch.zeros(1, _TOKENS, dtype=torch.long)
            yield made


def _patch_lists(names: Mapping[str, Any], channels: int, patch: int, g: torch.Generator) -> Iterator[Inputs]:
    for count in (36, 144):
        side = math.isqrt(count)
        made: Inputs = {"pixel_values": torch.randn(1, count, channels * patch * patch, generator=g)}
        places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), -1).reshape(
            1, -1, 2
        )
        for name in names:
            if name in ("spatial_shapes", "target_sizes"):
                made[name] = torch.tensor([[side, side]])
            elif name in ("pixel_position_ids", "image_position_ids"):
                made[name] = places
            elif name in ("pixel_attention_mask",):
                made[name] = torch.ones(1, count, dtype=torch.long)
        yield made


def _videos(names: Mapping[str, Any], config: Any, g: torch.Generator) -> Iterator[Inputs]:
    if "pixel_values_videos" not in names and not ("grid_thw" in names and "pixel_values" not in names):
        return
    if "grid_thw" in names or "video_grid_thw" in names:
        yield from _grids(names, config, g, "pixel_values_videos", "video_grid_thw")
    channels = next(numbers(config, "num_channels", "in_channels", "in_chans"), 3)
    frames = next(numbers(config, "num_frames", "frames_per_clip"), 4)
    for size in dict.fromkeys([*numbers(config, "image_size", "crop_size"), 64]):
        yield {"pixel_values_videos": torch.randn(1, frames, channels, size, size, generator=g)}


def _sounds(names: Mapping[str, Any], config: Any, g: torch.Generator) -> Iterator[Inputs]:
    if "input_values" in names:
        bins = next(numbers(config, "num_mel_bins"), 128)
        length = next(numbers(config, "max_length"), 1024)
        yield {"input_values": torch.randn(1, _SAMPLES, generator=g)}
        yield {"input_values": torch.randn(1, 1, _SAMPLES, generator=g)}
        yield {"input_values": torch.randn(1, length, bins, generator=g)}
    if "audio_mel" in names:
        bins = next(numbers(config, "input_feat_size"), 128)
        yield {
            "audio_mel": torch.randn(1, 100, bins, generator=g),
            "audio_mel_mask": torch.zeros(1, 100, dtype=torch.bool),
        }
    if "input_features" not in names:
        return
    bins = dict.fromkeys([
        *numbers(config, "feature_projection_input_dim", "num_mel_bins", "feature_size", "input_feat_per_channel",
                  "n_mels", "input_dim", "input_feat_size", "input_size"), 80, 128,
    ])  # fmt: skip
    longest = [2 * number for number in numbers(config, "max_source_positions", "max_position_embeddings")]
    # Short ones first: attention over long ones takes minutes.
    for b, length in itertools.product(bins, sorted({128, *longest[:1], 3000})):
        if b * length > 2_000_000:
            continue
        for shape in ((1, b, length), (1, length, b), (b, length), (1, 1, length, b)):
            frames = length
            made: Inputs = {"input_features": torch.randn(shape, generator=g)}
            for name in names:
                if name in ("input_features_mask", "feature_attention_mask"):
                    made[name] = torch.ones(1, frames, dtype=torch.long)
                elif name == "is_longer":
                    made[name] = torch.zeros(1, 1, dtype=torch.bool)
                elif name == "feature_lens":
                    made[name] = torch.tensor([frames])
                elif name == "aftercnn_lens":
                    made[name] = torch.tensor([frames // 2])
            yield made


def _others(names: Mapping[str, Any], config: Any, g: torch.Generator, text: Inputs) -> Iterator[Inputs]:
    """Series of numbers, patches of documents, states of games."""
    for series in guessed_series(names, config):
        yield {
            name: torch.randn(value.shape, generator=g) if value.is_floating_point() and "mask" not in name else value
            for name, value in series.items()
        }
    if "returns_to_go" in names:
        sizes = {"states": config.state_dim, "actions": config.act_dim, "rewards": 1, "returns_to_go": 1}
        yield {
            **{name: torch.randn(1, 4, size, generator=g) for name, size in sizes.items()},
            "timesteps": torch.arange(4)[None], "attention_mask": torch.ones(1, 4),
        }  # fmt: skip
    if "flattened_patches" in names:
        patch = next(numbers(config, "patch_size"), 16)
        for width in (*numbers(config, "patch_embed_hidden_size"), 3 * patch * patch + 2):
            patches = torch.rand(1, _TOKENS, width, generator=g)
            patches[..., :2] = torch.arange(_TOKENS)[:, None] % 4 + 1  # row and column
            yield {**text, "flattened_patches": patches}
            yield {**text, "flattened_patches": patches, "decoder_input_ids": torch.full((1, 4), 5)}


def _hidden(names: Mapping[str, Any], config: Any, g: torch.Generator) -> Iterator[Inputs]:
    if "query_embeds" in names or "encoder_hidden_states" in names:
        width = next(numbers(config, "hidden_size", "d_model"), 8)
        seen = next(numbers(config, "encoder_hidden_size"), width)
        name = next(
            name
            for name in ("query_embeds", "inputs_embeds", "hidden_states", "encoder_hidden_states")
            if name in names
        )
        yield {
            name: torch.randn(1, 8, width, generator=g),
            "encoder_hidden_states": torch.randn(1, 12, seen, generator=g),
        }
        if "input_ids" in names:
            yield {
                "input_ids": torch.randint(LEAST_ID, MOST_ID, (1, _TOKENS), generator=g),
                "encoder_hidden_states": torch.randn(1, 12, seen, generator=g),
            }
    sizes = list(dict.fromkeys(numbers(config, "hidden_size", "d_model", "embed_dim", "dim")))[:4]
    for name in ("inputs_embeds", "hidden_states", "latents", "embeds"):
        if name in names:
            for size in sizes:
                yield {name: torch.randn(1, _TOKENS, size, generator=g)}
    required = [name for name, p in names.items() if p.default is p.empty]
    for size in sizes:
        yield {
            name: torch.ones(1, _TOKENS) if "mask" in name else torch.randn(1, _TOKENS, size, generator=g)
            for name in required
        }
