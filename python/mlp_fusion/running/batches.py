"""Batches of a model's inputs: taken from what callers give, texts padded behind their tokens."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mlp_fusion.errors import InputError
from mlp_fusion.families.inputs import OTHER_INPUTS

Batch = Mapping[str, Tensor]
#: Rows are drawn from so many times as many tokens: enough to mix sentences, and an end to endless samples.
POOL = 64
#: Numbers of an image or of sound for one position in the model: 764 in ViT, 160 in Whisper, 320 in wav2vec 2.0.
_NUMBERS = 256
#: Arguments that go with an input and are none: masks, places, kinds, caches, labels.
_BESIDES = re.compile(
    r".*(mask|position|type_ids|labels?|cache|past_|_grid_|use_|output_|return_|decoder_).*|kwargs|args"
)


def main_input(model: Any) -> str:
    """The input that a model cannot do without, as its class says: `input_ids`, `pixel_values`, `input_features`.

    Of a part of a model, whose class does not say, the first argument that it must be given.
    """
    said = str(getattr(model, "main_input_name", "input_ids"))
    arguments = inspect.signature(model.forward).parameters
    if said in arguments:
        return said
    needed = [name for name, a in arguments.items() if a.default is a.empty and a.kind is a.POSITIONAL_OR_KEYWORD]
    return needed[0] if needed else said


def takes_text(model: Any) -> bool:
    """Whether text is all that a model takes: no images or sounds, which other FFNs of it would wait for."""
    names = inspect.signature(model.forward).parameters
    return main_input(model) == "input_ids" and not any(name in names for name in OTHER_INPUTS)


def other_inputs(model: Any) -> frozenset[str]:
    """Arguments of a model that may stand in the place of its main input: embeddings, frames, another tower's input."""
    names = inspect.signature(model.forward).parameters
    return frozenset(name for name in names if not _BESIDES.fullmatch(name))


def batches_of(
    model: Any, sample: Batch | Iterable[Batch], tokens: int, name: str = "sample"
) -> list[dict[str, Tensor]]:
    """:func:`take_batches` of what `model` takes."""
    return take_batches(
        sample, tokens, name, main=main_input(model), others=other_inputs(model), codebooks=_codebooks(model)
    )


def _codebooks(model: Any) -> int:
    """How many ids a position may have in a model of sounds in codes; 0 in others."""
    names = ("num_codebooks", "n_codebooks", "num_channels") if takes_text(model) else ("num_codebooks", "n_codebooks")
    counts = (getattr(getattr(model, "config", None), name, None) for name in names)
    return next((count for count in counts if type(count) is int), 0)


def take_batches(
    sample: Batch | Iterable[Batch],
    tokens: int,
    name: str = "sample",
    *,
    main: str = "input_ids",
    others: Collection[str] = (),
    codebooks: int = 0,
) -> list[dict[str, Tensor]]:
    """Batches from one batch or an iterable of them, until they hold `tokens` tokens, with their padding at the end.

    Without token ids, positions are counted as :func:`positions` does.

    Args:
        sample: a batch or batches, as the model's tokenizer or processor returns them.
        tokens: where to stop.
        name: what the caller calls them.
        main: what each must hold, see :func:`main_input`.
        others: or one of these instead, see :func:`other_inputs`.
        codebooks: a last axis of so many token ids is of one position, and not of a choice between texts.

    Raises:
        InputError: there is none, a batch is not a mapping of tensors with `main`, or no token is left unmasked.
    """
    maker = "a tokenizer" if main == "input_ids" else "the model's processor"
    # A tokenizer's BatchEncoding is a UserDict: a mapping by behaviour, not by type.
    batches: Iterable[Any] = [sample] if hasattr(sample, "keys") else sample
    if not hasattr(batches, "__iter__"):
        raise InputError(f"{name} is {batches!r}: give a batch, or an iterable of batches, as {maker} returns them")
    taken: list[dict[str, Tensor]] = []
    seen = 0
    for batch in batches:
        held = batch if hasattr(batch, "keys") else {}
        value = held.get(main)
        if value is None:
            value = next((held[key] for key in held if key in others and isinstance(held[key], Tensor)), None)
        if not isinstance(value, Tensor):
            raise InputError(f'a batch of {name} must map {main} to a tensor, as {maker} with return_tensors="pt"')
        if value.ndim < 2:
            raise InputError(f"{main} in a batch of {name} is {tuple(value.shape)}: give a row for each sample")
        if value.numel() == 0:
            continue  # a text without tokens
        taken.append(padded_behind(_tensors(batch, codebooks)))
        seen += positions(taken[-1])
        if seen >= tokens:
            break
    if not taken:
        raise InputError(f"{name} needs at least one batch: a mapping with {main}, as {maker} returns it")
    if seen == 0:
        raise InputError(f"{name} has no token: every attention mask is zero")
    return taken


def _tensors(batch: Mapping[str, Any], codebooks: int) -> dict[str, Tensor]:
    """The tensors that are a model's inputs: labels are a head's business, and text columns nobody's."""
    found = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.ndim > 0 and k != "labels"}
    # Gradients are taken on some: of tensors that inference mode has made, autograd keeps none.
    found = {k: v.clone() if v.is_inference() else v for k, v in found.items()}
    ids = found.get("input_ids")
    if not has_other_inputs(found):
        # Of text alone, one number per sequence is something to predict; beside images it may be a length.
        found = {k: v for k, v in found.items() if v.ndim >= 2}
    elif "label" in found:
        del found["label"]
    if ids is None or ids.ndim == 2 or (ids.ndim == 3 and ids.shape[-1] == codebooks):
        return found
    # Extra leading dimensions (choices) are flattened.
    lead = ids.shape[:-1]
    return {
        k: v.reshape(-1, *v.shape[len(lead) :]) if v.shape[: len(lead)] == lead and v.ndim > len(lead) else v
        for k, v in found.items()
    }


def has_other_inputs(batch: Batch) -> bool:
    """Whether a batch holds more than text: a floating-point tensor that is neither a mask nor a number per sample."""
    return any(v.is_floating_point() and v.ndim > 1 and "mask" not in name for name, v in batch.items())


def padded_behind(batch: Batch) -> dict[str, Tensor]:
    """`batch` with its sequences moved to the front of their rows, where padding stands before them.

    Models with absolute positions count them from the first column on, padding included: behind padding, every token
    would get the position, and with it the hidden states, of another one. A decoder's sequences move by their own mask.
    """
    own = {name: value for name, value in batch.items() if not name.startswith("decoder_")}
    decoders = {name: value for name, value in batch.items() if name.startswith("decoder_")}
    moved = {**_moved(own, ""), **_moved(decoders, "decoder_")}
    return {name: moved[name] for name in batch}


def _moved(batch: Batch, prefix: str) -> Batch:
    ids, mask = batch.get(f"{prefix}input_ids"), batch.get(f"{prefix}attention_mask")
    if ids is None or mask is None or mask.shape != ids.shape[:2] or bool(mask[:, :1].all()):
        return batch
    shape = mask.shape
    # Of a row without any token, all is padding: argmax is 0, and it stays.
    start = mask.bool().int().argmax(dim=1, keepdim=True)
    columns = (torch.arange(shape[1], device=mask.device) + start) % shape[1]

    def moved(tensor: Tensor) -> Tensor:
        # Positions may come once for all sequences; a token may have several ids, or the corners of a box.
        own = tensor.shape in (shape, (1, shape[1])) or (tensor.ndim == 3 and tensor.shape[:2] == shape)
        if not own or (tensor.ndim == 3 and tensor.is_floating_point()):
            return tensor
        rows = torch.arange(shape[0], device=tensor.device)[:, None]
        return tensor.expand(*shape, *tensor.shape[2:])[rows, columns.to(tensor.device)]

    return {name: moved(tensor) for name, tensor in batch.items()}


def token_mask(batch: Batch) -> Tensor:
    """`(batch, length)` bool, on the CPU: which positions of a batch with `input_ids` are tokens."""
    mask = batch.get("attention_mask")
    if mask is None:
        ids = batch["input_ids"]
        mask = torch.ones_like(ids[..., 0] if ids.ndim == 3 else ids)  # of codes, several ids are one position
    return mask.bool().cpu()


def positions(batch: Batch) -> int:
    """How many positions a batch has: its tokens.

    Without token ids, one for every 256 numbers of its largest input: about what a patch of an image or a frame of
    sound holds, and near enough to know when there are enough of them.
    """
    if "input_ids" in batch:
        return int(token_mask(batch).sum())
    largest = max(batch.values(), key=Tensor.numel)
    return max(len(largest), largest.numel() // _NUMBERS)


def samples(batch: Batch) -> int | None:
    """How many samples a batch has, where every tensor has one row for each; None where rows cannot be told apart.

    Beside token ids, images may be several to a sample, or none: such a batch stays in one piece.
    """
    if "input_ids" in batch and has_other_inputs(batch):
        return None
    lengths = {len(value) for value in batch.values()}
    return lengths.pop() if len(lengths) == 1 else None
