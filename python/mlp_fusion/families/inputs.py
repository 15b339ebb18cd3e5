"""Guesses at what a model takes: tensors of likely shapes, by the names of its arguments and what its config says."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_SAMPLES, _FRAMES = 16000, 3000
#: Inputs besides token ids that the guesses know.
OTHER_INPUTS = ("pixel_values", "pixel_values_videos", "input_values", "input_features", "past_values")


def _numbers(config: Any, *names: str) -> Iterator[int]:
    """What a config and its parts say under any of `names`."""
    keys = ("vision_config", "audio_config", "backbone_config", "encoder")
    parts = [config, *(getattr(config, key, None) for key in keys)]
    for part in parts:
        for name in names:
            value = getattr(part, name, None)
            first = value[0] if isinstance(value, (list, tuple)) and value else value
            if type(first) is int:
                yield first


def guessed_inputs(model: Any, tokens: int = 16) -> Iterator[dict[str, Tensor]]:
    """Guesses at a model's inputs, likely ones first: one sample, its text of `tokens` tokens; all entries equal."""
    names = inspect.signature(model.forward).parameters
    config = model.config
    text = {
        name: torch.full((1, tokens), 5)
        for name in ("input_ids", "decoder_input_ids", "task_inputs")
        if name in names
    }  # fmt: skip
    for size in dict.fromkeys([*_numbers(config, "image_size", "crop_size"), 224, 64, 640]):
        channels = next(_numbers(config, "num_channels", "in_channels", "in_chans"), 3)
        found = dict(text)
        if "pixel_values" in names:
            found["pixel_values"] = torch.zeros(1, channels, size, size)
        if "pixel_mask" in names:
            found["pixel_mask"] = torch.ones(1, size, size, dtype=torch.long)
        if "pixel_values_videos" in names:
            frames = next(_numbers(config, "num_frames", "frames_per_clip"), 4)
            found["pixel_values_videos"] = torch.zeros(1, frames, channels, size, size)
        if found:
            yield found
        if found == text:
            break
    if "pixel_values" in names:
        yield from _sequences_of_images(names, config, text)
    yield from _sounds(names, config, text)
    yield from guessed_series(names, config)
    for name in ("inputs_embeds", "hidden_states"):
        if name in names:
            for size in dict.fromkeys(_numbers(config, "hidden_size", "d_model", "embed_dim")):
                yield {name: torch.zeros(1, tokens, size)}


def _sequences_of_images(names: Mapping[str, Any], config: Any, text: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Videos, or several images to a sample; and an image cut into patches already, with their rows and columns."""
    channels = next(_numbers(config, "num_channels", "in_channels", "in_chans"), 3)
    frames = next(_numbers(config, "num_frames", "frames_per_clip"), 1)
    for size in dict.fromkeys([*_numbers(config, "image_size", "crop_size"), 224]):
        yield {**text, "pixel_values": torch.zeros(1, frames, channels, size, size)}
    if "image_grid_thw" in names:
        patch, frames = next(_numbers(config, "patch_size"), 14), next(_numbers(config, "temporal_patch_size"), 1)
        side = 2 * next(_numbers(config, "spatial_merge_size"), 2)
        patches = torch.zeros(side**2, channels * frames * patch**2)
        yield {**text, "pixel_values": patches, "image_grid_thw": torch.tensor([[1, side, side]])}


def _sounds(names: Mapping[str, Any], config: Any, text: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    spoken = {name: value for name, value in text.items() if name != "input_ids"}
    if "input_values" in names:
        yield {**spoken, "input_values": torch.zeros(1, _SAMPLES)}
        yield {**spoken, "input_values": torch.zeros(1, 1024, 128)}
    if "input_features" not in names:
        return
    longest = [2 * number for number in _numbers(config, "max_source_positions")]
    known = ("num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim")
    for bins in dict.fromkeys([*_numbers(config, *known), 80, 128]):
        for frames in dict.fromkeys([*longest, _FRAMES, 200]):
            for shape in ((1, bins, frames), (1, frames, bins), (bins, frames)):
                features = {"input_features": torch.zeros(shape)}
                lengths = {
                    name: torch.full((1,), frames // part)
                    for name, part in (("feature_lens", 1), ("aftercnn_lens", 2))
                    if name in names
                }  # fmt: skip
                yield {**text, **features, **lengths}
                yield {**spoken, **features, **lengths}


def guessed_series(names: Collection[str], config: Any) -> Iterator[dict[str, Tensor]]:
    """Series of numbers over time, all of them observed, with what goes beside them; for the arguments in `names`."""
    if "past_values" not in names:
        return
    length = next(_numbers(config, "context_length", "prediction_length"), 32)
    length += max(getattr(config, "lags_sequence", None) or [0])
    ahead = next(_numbers(config, "prediction_length"), 8)
    variables = next(_numbers(config, "num_input_channels", "input_size"), 1)
    features = next(_numbers(config, "num_time_features"), 1)
    # Some want an axis of variables even for one.
    for shape in ((1, length), (1, length, variables))[variables > 1 :]:
        known = {
            "past_values": torch.zeros(shape),
            "past_observed_mask": torch.ones(shape),
            "past_values_padding": torch.zeros(shape, dtype=torch.long),
            "past_time_features": torch.zeros(1, length, features),
            "future_time_features": torch.zeros(1, ahead, features),
            "future_values": torch.zeros(1, ahead, *shape[2:]),
            "freq": torch.zeros(1, 1, dtype=torch.long),
        }
        yield {name: value for name, value in known.items() if name in names}
