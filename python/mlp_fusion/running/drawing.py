"""A batch for any model, drawn at random, for when there is nothing of the user's own at hand."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlp_fusion.errors import InputError
from mlp_fusion.families import Architecture, FFNSite
from mlp_fusion.families.inputs import OTHER_INPUTS, guessed_inputs
from mlp_fusion.running.batches import main_input, positions, takes_text
from mlp_fusion.running.runner import Runner, placeholders
from mlp_fusion.running.taps import stream_activations

#: What models call the features that stand in the place of placeholders, and the input that those are made of.
_FEATURES = {
    "image": ("get_image_features", "pixel_values"),
    "video": ("get_video_features", "pixel_values_videos"),
    "audio": ("get_audio_features", "input_features"),
}


def random_batch(model: nn.Module, *, seed: int, batch: int = 8, length: int = 64) -> dict[str, Tensor]:
    """Inputs for `model`, uniformly drawn token ids or normally drawn numbers, for when there is nothing at hand.

    Text is `(batch, length)`, or shorter where the model has fewer positions. Images and sounds are of the size that
    the config says, few where they are large; the model is run on guesses until it takes one. Where it takes none, it
    gets text alone, if it runs on that.

    Raises:
        InputError: the model takes none of them.
    """
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    if takes_text(model):
        ids = _tokens(config, generator, batch, text_length(config, length))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad(), Runner(model, "random inputs") as runner:
        for drawn in _drawn(runner, generator, batch, length):
            try:
                runner.base(drawn)
            except InputError:
                continue  # a guess that the model does not take
            return drawn
        if main_input(model) == "input_ids":
            text = config.get_text_config(decoder=True)
            with contextlib.suppress(InputError):
                drawn = _text(model, _tokens(text, generator, batch, text_length(text, length)))
                runner.base(drawn)
                return drawn
    raise InputError(
        f"{type(model).__name__}: what it takes besides {main_input(model)} cannot be guessed: "
        "give sample, a batch of the model's own processor"
    )


def text_reaches(model: nn.Module, architecture: Architecture, sites: Sequence[FFNSite]) -> bool:
    """Whether text alone runs all of `sites`: those of a model that takes nothing else, or of its part for text."""
    if takes_text(model) or main_input(model) != "input_ids":
        return takes_text(model)
    try:
        text = [_text(model, torch.full((1, 8), 3))]
        stream_activations(model, architecture, sites, text, lambda _number, _mask, _taps: None)
    except InputError:
        return False
    return True


def text_length(config: Any, length: int) -> int:
    """`length` or less, as positions and the chunks of FFNs allow."""
    known = getattr(config, "max_position_embeddings", None) or getattr(config, "max_target_positions", None) or length
    # RoBERTa counts positions from its padding id on, so that a few of the table's rows are never reached.
    length = min(length, max(1, int(known) - 2)) if known > 0 else length
    chunk = getattr(config, "chunk_size_feed_forward", 0) or 1
    return max(chunk, length - length % chunk)


def _tokens(config: Any, generator: torch.Generator, batch: int, length: int) -> Tensor:
    """`(batch, length)` ids, none of them padding.

    Raises:
        InputError: the config does not say how many tokens there are.
    """
    words = getattr(config, "vocab_size", None)
    if not isinstance(words, int):
        raise InputError(f"{config.model_type}: its config has no vocab_size to draw tokens from: give sample")
    ids = torch.randint(0, words, (batch, length), generator=generator)
    pad = getattr(config, "pad_token_id", None)
    if pad is not None:
        ids[ids == pad] = (int(pad) + 1) % words
    return ids


def _drawn(runner: Runner, generator: torch.Generator, batch: int, length: int) -> Iterator[dict[str, Tensor]]:
    """Guesses at what the model takes, with random numbers and ids in them; none that are text alone."""
    model: Any = runner.model
    text = model.config.get_text_config(decoder=True)
    length = text_length(text, length)
    # Long sounds cost time, and are needed only where a model takes no shorter ones; images have the config's size.
    for guess in sorted(guessed_inputs(model, length), key=_sound):
        inputs = {name: guess[name] for name in OTHER_INPUTS if name in guess}
        if not inputs:
            continue
        # A large image is as good as many sentences.
        count = min(batch, max(2, batch * length // positions(inputs)))
        drawn = {name: torch.cat([value] * count) for name, value in guess.items()}
        for name, value in drawn.items():
            if value.is_floating_point() and "mask" not in name:
                drawn[name] = torch.randn(value.shape, generator=generator)
            elif name in ("input_ids", "decoder_input_ids"):
                drawn[name] = _tokens(text, generator, len(value), length)
        try:
            yield _with_placeholders(runner, drawn) if "input_ids" in drawn else drawn
        except InputError:
            continue  # a part of the model does not take the guess


def _sound(guess: Mapping[str, Tensor]) -> int:
    return max((guess[name].numel() for name in ("input_values", "input_features") if name in guess), default=0)


def _with_placeholders(runner: Runner, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
    """`drawn`, with as many placeholders before its text as there are features of its images and sounds."""
    model: Any = runner.model
    special = placeholders(model.config)
    ids = _plain(drawn["input_ids"], special)
    kinds = torch.zeros_like(ids)
    for number, (kind, (method, name)) in enumerate(_FEATURES.items(), 1):
        token = next((t for key in ("id", "index") if (t := getattr(model.config, f"{kind}_token_{key}", None))), None)
        make = getattr(model, method, None)
        if token is not None and make is not None and name in drawn:
            taken = inspect.signature(make).parameters
            features = runner.call(make, {key: value for key, value in drawn.items() if key in taken or key == name})
            if isinstance(features, Mapping):
                features = features["pooler_output" if "pooler_output" in features else "last_hidden_state"]
            parts = [features] if isinstance(features, Tensor) else features
            count = sum(part.numel() // part.shape[-1] for part in parts) // len(ids)
            ids = torch.cat([torch.full((len(ids), count), int(token)), ids], dim=1)
            kinds = torch.cat([torch.full((len(ids), count), number), kinds], dim=1)
    found = {**drawn, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        found["mm_token_type_ids"] = kinds
    return found


def _text(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """A batch of ids alone, without placeholders for anything else."""
    plain = _plain(ids, placeholders(model.config))
    return {"input_ids": plain, "attention_mask": torch.ones_like(plain)}


def _plain(ids: Tensor, special: Sequence[int]) -> Tensor:
    """`ids`, with an ordinary token in the place of special ones."""
    plain = next(token for token in range(3, 4 + len(special)) if token not in special)
    return ids.masked_fill(torch.isin(ids, torch.tensor(special, dtype=ids.dtype)), plain)
