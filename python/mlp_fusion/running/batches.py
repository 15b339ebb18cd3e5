"""Batches of token ids: taken from what callers give, padded behind their tokens, or drawn at random."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mlp_fusion.errors import InputError

Batch = Mapping[str, Tensor]
#: Rows are drawn from so many times as many tokens: enough to mix sentences, and an end to endless samples.
POOL = 64


def random_batch(model: nn.Module, *, seed: int, batch: int = 8, length: int = 64) -> dict[str, Tensor]:
    """Uniformly drawn token ids `(batch, length)` for `model`, for when there is no text at hand."""
    config: Any = model.config
    positions = getattr(config, "max_position_embeddings", None) or length
    # RoBERTa counts positions from its padding id on, so that a few of the table's rows are never reached.
    length = min(length, max(1, int(positions) - 2))
    chunk = getattr(config, "chunk_size_feed_forward", 0) or 1
    length = max(chunk, length - length % chunk)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, int(config.vocab_size), (batch, length), generator=generator)
    pad = getattr(config, "pad_token_id", None)
    if pad is not None:
        ids[ids == pad] = (int(pad) + 1) % int(config.vocab_size)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def take_batches(sample: Batch | Iterable[Batch], tokens: int, name: str = "sample") -> list[dict[str, Tensor]]:
    """Batches from one batch or an iterable of them, until they hold `tokens` tokens, with their padding at the end.

    `name` is what the caller calls them.

    Raises:
        InputError: there is none, a batch is not a mapping of tensors with `input_ids`, or no token is left unmasked.
    """
    # A tokenizer's BatchEncoding is a UserDict: a mapping by behaviour, not by type.
    batches: Iterable[Any] = [sample] if hasattr(sample, "keys") else sample
    if not hasattr(batches, "__iter__"):
        raise InputError(f"{name} is {batches!r}: give a batch, or an iterable of batches, as a tokenizer returns them")
    taken: list[dict[str, Tensor]] = []
    seen = 0
    for batch in batches:
        if not hasattr(batch, "keys") or not isinstance(batch.get("input_ids"), Tensor):
            raise InputError(
                f'a batch of {name} must map input_ids to a tensor, as a tokenizer with return_tensors="pt"'
            )
        if batch["input_ids"].numel() == 0:
            continue  # a text without tokens
        # Labels are a head's business, and text columns nobody's; extra leading dimensions (choices) are flattened.
        tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.ndim >= 2 and k != "labels"}
        taken.append(padded_behind({k: v.reshape(-1, v.shape[-1]) for k, v in tensors.items()}))
        seen += int(token_mask(taken[-1]).sum())
        if seen >= tokens:
            break
    if not taken:
        raise InputError(f"{name} needs at least one batch: a mapping with input_ids, as a tokenizer returns it")
    if seen == 0:
        raise InputError(f"{name} has no token: every attention mask is zero")
    return taken


def padded_behind(batch: Batch) -> dict[str, Tensor]:
    """`batch` with its sequences moved to the front of their rows, where padding stands before them.

    Models with absolute positions count them from the first column on, padding included: behind padding, every token
    would get the position, and with it the hidden states, of another one.
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is None or mask.shape != ids.shape or bool(mask[:, :1].all()):
        return dict(batch)
    # Of a row without any token, all is padding: argmax is 0, and it stays.
    start = mask.bool().int().argmax(dim=1, keepdim=True)
    columns = (torch.arange(ids.shape[1], device=mask.device) + start) % ids.shape[1]

    def moved(tensor: Tensor) -> Tensor:
        # Positions may come once for all sequences.
        if tensor.shape not in (ids.shape, (1, ids.shape[1])):
            return tensor
        return tensor.expand(ids.shape).gather(1, columns.to(tensor.device))

    return {name: moved(tensor) for name, tensor in batch.items()}


def token_mask(batch: Batch) -> Tensor:
    """`(batch, length)` bool, on the CPU: which positions are tokens."""
    mask = batch.get("attention_mask")
    return (torch.ones_like(batch["input_ids"]) if mask is None else mask).bool().cpu()
