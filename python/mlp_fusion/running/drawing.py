"""A batch for any model, drawn at random, for when there is nothing of the user's own at hand."""

from __future__ import annotations

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

    Text is as of :func:`random_text`. Images and sounds are of the size that the config says, few where they are large;
    the model is run on guesses until it takes one.

    Raises:
        InputError: the model takes none of them.
    """
    if takes_text(model):
        return random_text(model, seed=seed, batch=batch, length=length)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), Runner(model, "random inputs") as runner:
        for drawn in _drawn(runner, generator, batch, length):
            try:
                runner.base(drawn)
            except InputError:
                continue  # a guess that the model does not take
            return drawn
    raise InputError(
        f"{type(model).__name__}: what it takes besides {main_input(model)} cannot be guessed: "
        "give sample, a batch of the model's own processor"
    )


def random_text(model: Any, *, seed: int, batch: int = 8, length: int = 64) -> dict[str, Tensor]:
    """Uniformly drawn token ids, `(batch, length)`, or shorter where the model has fewer positions.

    Raises:
        InputError: its config does not say how many tokens there are.
    """
    config = model.config if takes_text(model) else model.config.get_text_config(decoder=True)
    ids = _tokens(config, torch.Generator().manual_seed(seed), batch, text_length(config, length))
    if not takes_text(model):
        ids = plain_ids(ids, model.config)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def text_refusal(model: nn.Module, architecture: Architecture, sites: Sequence[FFNSite]) -> str | None:
    """Why text alone does not run all of `sites`, those of the part for text, say; None where it does.

    A model that seems to take nothing else is taken at its word.
    """
    if takes_text(model):
        return None
    if main_input(model) != "input_ids":
        return "the model does not run on text alone: use fuse, with batches of its processor"
    try:
        text = random_text(model, seed=0, batch=1, length=8)
        stream_activations(model, architecture, sites, [text], lambda _number, _mask, _taps: None)
    except InputError as error:
        return (
            f"text alone does not run the FFNs that are to be narrowed ({error}): choose those that it runs (layers), "
            "or use fuse, with batches of the model's processor"
        )
    return None


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
    ids = plain_ids(drawn["input_ids"], model.config)
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


def plain_ids(ids: Tensor, config: Any) -> Tensor:
    """`ids`, with an ordinary token in the place of each that stands for an image or a sound."""
    special = placeholders(config)
    plain = next(token for token in range(3, 4 + len(special)) if token not in special)
    return ids.masked_fill(torch.isin(ids, torch.tensor(special, dtype=ids.dtype)), plain)
