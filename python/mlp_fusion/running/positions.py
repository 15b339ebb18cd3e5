"""Which positions of what passes through an FFN are tokens, patches or frames, and which are padding."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mlp_fusion.running.batches import Batch, token_mask

#: Components of paths: of a side of an encoder-decoder, and of what reads no text.
_SIDE = re.compile(r"(?:.*_)?(encoder|decoder)")
_OTHER = re.compile(
    r"(.*_)?(vision|visual|image|video|audio|speech|pixel|projector|connector|merger|resampler|perceiver|qformer)(_.*)?"
)


def counted(x: Tensor, batch: Batch, path: str) -> Tensor:
    """Which rows of `x (..., d)`, what an FFN got of a batch, count: bool, on the CPU, `(sequences, positions, ...)`.

    The attention mask says so where it has as many positions as `x`, as `(batch, length)`, the other way round, or
    flattened. FFNs of a decoder have the decoder's mask, or all of its tokens. Otherwise every row counts: patches of
    images, frames of sound, tokens packed without padding.

    Args:
        x: rows, in any number of leading dimensions.
        batch: what the model was run on.
        path: of the FFN in the model: with a component `decoder`, it is the decoder's, whatever the lengths; with
            `encoder`, it is not; in a `vision` or `audio` tower beside text, neither mask is its.
    """
    mask = _fitting(x.shape[:-1], batch, path)
    return _all(x) if mask is None else mask


def by_sequence(calls: Mapping[str, Sequence[Tensor]], batch: Batch, path: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The mask of :func:`counted`, and every tensor as `(*mask.shape, d)`.

    Args:
        calls: name -> what passed through in each call of the FFN on the batch: one, several along the sequence where
            it runs in chunks, or several with all of it, where layers share the FFN.
        batch, path: as in :func:`counted`.
    """
    first = next(iter(calls.values()))
    mask = _fitting(first[0].shape[:-1], batch, path)
    if mask is not None and all(part.shape == first[0].shape for part in first):
        found = mask
        laid = {name: torch.cat([_laid_out(part, found) for part in parts]) for name, parts in calls.items()}
        return mask.repeat(len(first), 1), laid
    whole = {name: _joined(parts) for name, parts in calls.items()}
    mask = counted(whole[next(iter(calls))], batch, path)
    return mask, {name: _laid_out(tensor, mask) for name, tensor in whole.items()}


def _fitting(lead: torch.Size, batch: Batch, path: str) -> Tensor | None:
    """The mask with as many positions as the leading dimensions `lead`; None where there is none."""
    for mask in _masks(batch, path):
        if lead in (mask.shape, mask.shape[::-1]):
            return mask
        if mask.numel() == math.prod(lead) and (len(lead) == 1 or (len(lead) == 2 and lead[0] == 1)):
            return mask
    return None


def _masks(batch: Batch, path: str) -> Iterator[Tensor]:
    """Masks that may be those of the FFN at `path`, the likely one first."""
    parts = path.split(".")
    if "input_ids" in batch and any(_OTHER.fullmatch(part) for part in parts):
        return
    side = next((found[1] for part in parts if (found := _SIDE.fullmatch(part))), "")
    own = token_mask(batch) if "input_ids" in batch or "attention_mask" in batch else None
    decoders = {k.removeprefix("decoder_"): v for k, v in batch.items() if k.startswith("decoder_")}
    other = token_mask(decoders) if "input_ids" in decoders or "attention_mask" in decoders else None
    # A decoder without ids of its own reads the encoder's text.
    wanted = {"encoder": [own], "decoder": [own if other is None else other]}.get(side, [own, other])
    yield from (mask for mask in wanted if mask is not None and mask.ndim == 2)


def _all(x: Tensor) -> Tensor:
    lead = x.shape[:-1]
    return torch.ones(lead if len(lead) > 1 else (1, *lead), dtype=torch.bool)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Several calls as one: along the sequence where that can be, else row behind row."""
    if len(parts) == 1:
        return parts[0]
    if all(part.ndim == 3 and len(part) == len(parts[0]) for part in parts):
        return torch.cat(list(parts), dim=1)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def _laid_out(x: Tensor, mask: Tensor) -> Tensor:
    """`x (..., d)` as `(*mask.shape, d)`."""
    lead = x.shape[:-1]
    if len(lead) == 2 and lead == mask.shape[::-1] and lead != mask.shape:
        return x.transpose(0, 1)  # a model that has the sequence first
    return x.reshape(*mask.shape, x.shape[-1])
