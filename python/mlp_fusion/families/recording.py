"""Arguments of modules that cannot be called alone, recorded while the whole model runs on the meta device."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mlp_fusion.families.building import materialise

_TOKENS, _SAMPLES, _FRAMES = 16, 16000, 3000
#: Entries of the largest model that is run with values.
_LARGEST_RUN = 1_000_000_000


class _EnoughError(Exception):
    """Every module that was waited for has been called."""


Call = tuple[tuple[Any, ...], dict[str, Any]]


def record_arguments(model: nn.Module, wanted: set[str]) -> dict[str, Call]:
    """What the modules at the paths `wanted` are called with, tensors with random entries in place of hidden states.

    The model, on the meta device, is run on guesses at its inputs, until one reaches every module or all were tried.
    Where its control flow wants values, a copy runs whose matrices are zeros without memory of their own. Modules that
    no guess reaches are left out.
    """
    recorded = _run(model, wanted, "meta")
    if recorded.keys() < wanted and sum(p.numel() for p in model.parameters()) < _LARGEST_RUN:
        recorded = {**_run(materialise(model, set(), large=True), wanted - recorded.keys(), "cpu"), **recorded}
    g = torch.Generator().manual_seed(2)
    return {
        path: (tuple(_real("", a, g) for a in args), {k: _real(k, v, g) for k, v in kwargs.items()})
        for path, (args, kwargs) in recorded.items()
    }


def _run(model: nn.Module, wanted: set[str], device: str) -> dict[str, Call]:
    recorded: dict[str, Call] = {}

    def note(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            recorded.setdefault(path, (args, kwargs))
            if recorded.keys() >= wanted:
                raise _EnoughError

        return hook

    hooks = [
        module.register_forward_pre_hook(note(path), with_kwargs=True)
        for path, module in model.named_modules()
        if path in wanted
    ]
    try:
        for inputs in _inputs(model):
            try:
                with torch.no_grad(), torch.device(device):
                    model(**{name: value.to(device) for name, value in inputs.items()})
                break  # what it has not called now, it will not call on other inputs
            except _EnoughError:
                break
            except Exception:  # noqa: BLE001  (a guess that the model does not take)
                continue
    finally:
        for hook in hooks:
            hook.remove()
    return recorded


def _real(name: str, value: Any, g: torch.Generator) -> Any:
    """A real value with random hidden states; masks and numbers are as they were, where they were real."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and "mask" not in name:
            return torch.randn(value.shape, generator=g)
        if not value.is_meta:
            return value
        return torch.full(value.shape, value.dtype == torch.bool, dtype=value.dtype)
    if isinstance(value, (tuple, list)):
        return type(value)(_real(name, part, g) for part in value) if type(value) in (tuple, list) else value
    if isinstance(value, Mapping):
        return {key: _real(str(key), part, g) for key, part in value.items()}
    return None if "Cache" in type(value).__name__ else value


def _numbers(config: Any, *names: str) -> Iterator[int]:
    """What a config and its parts say under any of `names`."""
    parts = [config, *(getattr(config, key, None) for key in ("vision_config", "audio_config", "backbone_config"))]
    for part in parts:
        for name in names:
            value = getattr(part, name, None)
            first = value[0] if isinstance(value, (list, tuple)) and value else value
            if type(first) is int:
                yield first


def _inputs(model: Any) -> Iterator[dict[str, Tensor]]:
    """Guesses at a model's inputs, by the names of its arguments."""
    names = inspect.signature(model.forward).parameters
    config = model.config
    text = {
        name: torch.full((1, _TOKENS), 5)
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
    yield from _sounds(names, config, text)
    for name in ("inputs_embeds", "hidden_states"):
        if name in names:
            for size in dict.fromkeys(_numbers(config, "hidden_size", "d_model", "embed_dim")):
                yield {name: torch.zeros(1, _TOKENS, size)}


def _sounds(names: Mapping[str, Any], config: Any, text: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    spoken = {name: value for name, value in text.items() if name != "input_ids"}
    if "input_values" in names:
        yield {**spoken, "input_values": torch.zeros(1, _SAMPLES)}
        yield {**spoken, "input_values": torch.zeros(1, 1024, 128)}
    if "input_features" not in names:
        return
    longest = [2 * number for number in _numbers(config, "max_source_positions")]
    for bins in dict.fromkeys([*_numbers(config, "num_mel_bins", "feature_size", "input_feat_per_channel"), 80, 128]):
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
