"""Parts of a text, or samples of anything else, that stand for all of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from mlp_fusion.running.batches import Batch, positions, samples, token_mask

#: Positions of one run at most, and of one sequence.
_RUN, _SEQUENCE = 1024, 512
#: What can be padded where a mask leaves the padding out.
_PADDED = frozenset({"input_ids", "attention_mask", "token_type_ids"})


def excerpts(model: nn.Module, batches: Sequence[Batch], count: int) -> Iterator[Batch]:
    """About `count` positions spread evenly over the batches, at most 1,024 at a time where a sample allows.

    Of texts, the first 512 tokens of sequences, those of several batches side by side; of anything else, whole samples.
    """
    if not all(cuttable(batch) for batch in batches):
        return _pieces(batches, count)
    return _joined(_windows(batches, count, chunk=getattr(model.config, "chunk_size_feed_forward", 0) or 1))


def cuttable(batch: Batch) -> bool:
    """Whether a batch is one text per row, every tensor token by token; of codebooks, several rows are one."""
    ids = batch.get("input_ids")
    return (
        ids is not None
        and ids.ndim == 2
        and all(
            value.shape in (ids.shape, (1, ids.shape[1])) and not name.startswith("decoder_")
            for name, value in batch.items()
        )
    )


def _pieces(batches: Sequence[Batch], wanted: int) -> Iterator[Batch]:
    """Whole samples spread evenly over the batches, with about `wanted` positions in all.

    At least one sample at a time, or one batch where its samples cannot be told apart.
    """
    step = -(-sum(positions(batch) for batch in batches) // wanted)
    seen = 0
    for batch in batches:
        count = samples(batch)
        if count is None:
            if seen % step == 0:
                yield batch
            seen += 1
            continue
        chosen = torch.arange(count)[(seen + torch.arange(count)) % step == 0]
        seen += count
        if len(chosen) == 0:
            continue
        for part in chosen.split(max(1, _RUN * count // positions(batch))):
            yield {name: value[part.to(value.device)] for name, value in batch.items()}


def _windows(batches: Sequence[Batch], wanted: int, chunk: int) -> Iterator[dict[str, Tensor]]:
    """Sequences spread evenly over the batches, with about `wanted` tokens in all, cut to what they have of tokens.

    A multiple of `chunk` in length, as that of a batch is.
    """
    longest = max(_SEQUENCE - _SEQUENCE % chunk, chunk)
    masks = [token_mask(batch) for batch in batches]
    # Per batch: where each sequence begins, behind its padding, and what is looked at of it.
    starts = [mask.int().argmax(dim=1) for mask in masks]
    ends = [mask.shape[1] - mask.flip(1).int().argmax(dim=1) for mask in masks]
    counts = [
        ((end - start) * mask.any(dim=1)).clamp(max=longest)
        for mask, start, end in zip(masks, starts, ends, strict=True)
    ]
    step = -(-int(torch.cat(counts).sum()) // wanted)
    seen = 0
    for batch, start, count in zip(batches, starts, counts, strict=True):
        present = count.nonzero().squeeze(1)
        chosen = present[(seen + torch.arange(len(present))) % step == 0]
        seen += len(present)
        while len(chosen) > 0:
            lengths = -(-count[chosen] // chunk) * chunk
            # As many as fit beside one another at the length of the longest, one at least.
            fits = lengths.cummax(0).values * torch.arange(1, len(chosen) + 1) <= _RUN
            size = max(1, int(fits.sum()))
            part, length = chosen[:size], int(lengths[:size].max())
            yield window_of(batch, part, start[part], length)
            chosen = chosen[size:]


def _joined(parts: Iterable[Batch]) -> Iterator[Batch]:
    """The same texts in the same order, those of several batches side by side, at most 1,024 positions at a time.

    Shorter ones are padded behind, where a mask can say so.
    """
    held: list[Batch] = []
    for part in parts:
        if held and not _fits(held, part):
            yield _side_by_side(held)
            held = []
        held.append(part)
    if held:
        yield _side_by_side(held)


def _fits(held: Sequence[Batch], part: Batch) -> bool:
    """Whether a text may stand beside those that are held."""
    every = [*held, part]
    if held[0].keys() != part.keys() or "attention_mask" not in part or not part.keys() <= _PADDED:
        return False
    if any(value.shape != each["input_ids"].shape for each in every for value in each.values()):
        return False
    length = max(each["input_ids"].shape[1] for each in every)
    return length * sum(len(each["input_ids"]) for each in every) <= _RUN


def _side_by_side(held: Sequence[Batch]) -> Batch:
    if len(held) == 1:
        return held[0]
    length = max(each["input_ids"].shape[1] for each in held)
    return {
        name: torch.cat([torch.nn.functional.pad(e[name], (0, length - e[name].shape[1])) for e in held])
        for name in held[0]
    }


def window_of(batch: Batch, rows: Tensor, start: Tensor, length: int) -> dict[str, Tensor]:
    """`length` positions of the sequences numbered `rows`, from `start` on or from where they fit."""
    sequences, width = batch["input_ids"].shape
    columns = torch.minimum(start, torch.tensor(width - length)).unsqueeze(1) + torch.arange(length)
    return {
        # Positions may come once for all sequences.
        key: tensor.expand(sequences, -1)[rows.unsqueeze(1).to(tensor.device), columns.to(tensor.device)]
        for key, tensor in batch.items()
    }
