"""A sample of what goes into and comes out of each FFN while the model runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlp_fusion.architectures import Architecture, FFNSite
from mlp_fusion.errors import InputError

Batch = Mapping[str, Tensor]

#: Rows are drawn from so many times as many tokens: enough to mix sentences, and an end to endless samples.
POOL = 64


@dataclass(frozen=True, eq=False)
class Activations:
    """Rows of one FFN: inputs `x (T, d)` and the model's own outputs `y (T, d_out)`, in the model's dtype."""

    x: Tensor
    y: Tensor


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


def take_batches(sample: Batch | Iterable[Batch], tokens: int) -> list[dict[str, Tensor]]:
    """Batches from one batch or an iterable of them, until they hold `tokens` tokens; masks are on the CPU.

    Raises:
        InputError: there is none, a batch is not a mapping of tensors with `input_ids`, or no token is left unmasked.
    """
    # A tokenizer's BatchEncoding is a UserDict: a mapping by behaviour, not by type.
    batches: Iterable[Any] = [sample] if hasattr(sample, "keys") else sample
    taken: list[dict[str, Tensor]] = []
    seen = 0
    for batch in batches:
        if not hasattr(batch, "keys") or not isinstance(batch.get("input_ids"), Tensor):
            raise InputError(
                'a batch of sample must map input_ids to a tensor, as a tokenizer with return_tensors="pt"'
            )
        # Labels are a head's business, and text columns nobody's; extra leading dimensions (choices) are flattened.
        tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.ndim >= 2 and k != "labels"}
        taken.append({k: v.reshape(-1, v.shape[-1]) for k, v in tensors.items()})
        seen += int(token_mask(taken[-1]).sum())
        if seen >= tokens:
            break
    if not taken:
        raise InputError("sample needs at least one batch: a mapping with input_ids, as a tokenizer returns it")
    if seen == 0:
        raise InputError("sample has no token: every attention mask is zero")
    return taken


def token_mask(batch: Batch) -> Tensor:
    """`(batch, length)` bool, on the CPU: which positions are tokens."""
    mask = batch.get("attention_mask")
    return (torch.ones_like(batch["input_ids"]) if mask is None else mask).bool().cpu()


@torch.no_grad()
def capture_activations(
    model: nn.Module,
    architecture: Architecture,
    sites: Sequence[FFNSite],
    sample: Batch | Iterable[Batch],
    *,
    rows: int,
    seed: int,
) -> list[Activations]:
    """Run `model` over `sample` and keep up to `rows` token positions of every FFN in `sites`.

    The same positions are kept at every FFN, drawn uniformly from those that the attention masks leave. Memory: `rows`
    rows per FFN and one batch's activations. The model is put in evaluation mode for the run and back afterwards.

    Returns:
        One `Activations` per site, in their order.

    Raises:
        InputError: the sample has no token, or an FFN did not run.
    """
    batches = take_batches(sample, POOL * rows)
    masks = [token_mask(b) for b in batches]
    total = sum(int(m.sum()) for m in masks)
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:rows]] = True
    kept: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in sites]
    calls: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in sites]
    handles = []
    for number, site in enumerate(sites):

        def save_input(_m: nn.Module, args: tuple[Tensor, ...], n: int = number) -> None:
            calls[n][0].append(args[0])

        def save_output(_m: nn.Module, _args: tuple[Tensor, ...], y: Tensor, n: int = number) -> None:
            calls[n][1].append(y)

        handles.append(architecture.projection(site, "w_in").register_forward_pre_hook(save_input))
        handles.append(architecture.projection(site, "w_out").register_forward_hook(save_output))
    device = next(model.parameters()).device
    # The head has no FFN of ours, may ask for more than token ids, and makes the largest tensors of all.
    base: Any = getattr(model, "base_model", model)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        start = 0
        for batch, mask in zip(batches, masks, strict=True):
            try:
                base(**{k: v.to(device) for k, v in batch.items()})
            except (ValueError, IndexError, TypeError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:200]
                raise InputError(f"the model cannot run on the sample ({type(error).__name__}: {reason})") from error
            keep = torch.zeros_like(mask)
            keep[mask] = chosen[start : start + int(mask.sum())]
            start += int(mask.sum())
            for (xs, ys), (calls_x, calls_y) in zip(kept, calls, strict=True):
                if not calls_x or not calls_y:
                    raise InputError("an FFN did not run on the sample: the model skips it")
                # A model that chunks its FFN (chunk_size_feed_forward) calls it several times, along the sequence.
                for store, parts in ((xs, calls_x), (ys, calls_y)):
                    joined = torch.cat([p.reshape(*mask.shape[:1], -1, p.shape[-1]) for p in parts], dim=1)
                    store.append(joined[keep.to(joined.device)].clone())
                    parts.clear()
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return [Activations(torch.cat(xs), torch.cat(ys)) for xs, ys in kept]
