"""A uniform sample of what streams through each FFN: the same tokens at every FFN that sees all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlp_fusion.errors import InputError
from mlp_fusion.running.batches import Batch, token_mask


class RowPlan:
    """In which order the tokens of the batches are preferred as rows: drawn once, uniformly, for all FFNs.

    Attributes:
        seed: of the order, and of what FFNs that see other positions draw for themselves.
        tokens: how many there are in all; 0 where a batch has no token ids.
        ranks: per batch, the places of its tokens in that order.
    """

    def __init__(self, batches: Sequence[Batch], seed: int) -> None:
        self.seed = seed
        text = all("input_ids" in batch for batch in batches)
        counts = [int(token_mask(batch).sum()) for batch in batches] if text else []
        self.tokens = sum(counts)
        order = torch.randperm(self.tokens, generator=torch.Generator().manual_seed(seed))
        ranks = torch.empty_like(order)
        ranks[order] = torch.arange(self.tokens)
        self.ranks = list(ranks.split(counts)) if text else []


class RowSample:
    """Up to `capacity` rows of one FFN, drawn uniformly without replacement while they stream by; `add` every batch.

    Every row has a key, and the smallest stay. Where an FFN has as many rows as the batch has tokens, keys follow the
    plan; FFNs that see something else (patches, a decoder's tokens) draw theirs, the same at all that see as much.
    """

    def __init__(self, plan: RowPlan, capacity: int) -> None:
        self._plan, self._capacity = plan, capacity
        self._generator = torch.Generator().manual_seed(plan.seed)
        self._batches = self._sequences = self._seen = 0
        self._keys = torch.empty(0, dtype=torch.float64)
        # Per row: where it was in the stream, and in which sequence.
        self._places, self._owners = (torch.empty(0, dtype=torch.int64) for _ in range(2))
        self._kept: list[Tensor] = []

    def add(self, mask: Tensor, *rows: Tensor) -> None:
        """Offer the rows of one batch, each tensor `(T, ...)`, for the T positions that `mask (sequences, ...)` has."""
        owners = mask.nonzero()[:, 0] + self._sequences
        keys, taken = self._drawn(len(owners))
        before = len(self._keys)
        everything = torch.cat([self._keys, keys])
        stays = torch.ones(len(everything), dtype=torch.bool)
        if len(everything) > self._capacity:
            stays[everything.argsort()[self._capacity :]] = False
        chosen = stays[before:]
        keys, taken = keys[chosen], taken[chosen]
        # Into the places of those that go, then behind the others.
        free = (~stays[:before]).nonzero().squeeze(1)
        slots = torch.cat([free, torch.arange(before, before + len(taken) - len(free))])
        self._keys = _filled(self._keys, slots, keys)
        self._places = _filled(self._places, slots, taken + self._seen)
        self._owners = _filled(self._owners, slots, owners[taken])
        self._keep(slots, [row[taken.to(row.device)] for row in rows])
        self._batches += 1
        self._sequences += len(mask)
        self._seen += len(owners)

    def finish(self, *, may_be_empty: bool = False) -> tuple[list[Tensor], Tensor]:
        """What was kept, in the order of the stream: the rows, `(R, ...)` each, and their sequences, `(R,)` int64.

        Args:
            may_be_empty: there may be none, as of an expert that nothing is routed to.

        Raises:
            InputError: there was no row.
        """
        count = len(self._places)
        if count == 0 and not may_be_empty:
            raise InputError("no position of the batches counts: every mask of an FFN's positions is zero")
        order = self._places.argsort()
        if len(self._kept[0]) == count and bool((order == torch.arange(count)).all()):
            return self._kept, self._owners
        return [kept[order.to(kept.device)] for kept in self._kept], self._owners[order]

    def _drawn(self, count: int) -> tuple[Tensor, Tensor]:
        """Keys in [0, 1) of those of `count` rows that may stay, and their numbers."""
        ranks = self._plan.ranks[self._batches] if self._batches < len(self._plan.ranks) else None
        if ranks is not None and len(ranks) == count:
            taken = (ranks < self._capacity).nonzero().squeeze(1)
            return ranks[taken].double() / self._plan.tokens, taken
        return torch.rand(count, generator=self._generator, dtype=torch.float64), torch.arange(count)

    def _keep(self, slots: Tensor, rows: Sequence[Tensor]) -> None:
        needed = max(len(self._keys), min(self._capacity, self._plan.tokens))
        if not self._kept:
            self._kept = [row.new_zeros(needed, *row.shape[1:]) for row in rows]
        room = len(self._kept[0])
        if room < needed:
            more = min(self._capacity, max(2 * room, needed)) - room
            self._kept = [torch.cat([kept, kept.new_zeros(more, *kept.shape[1:])]) for kept in self._kept]
        for kept, row in zip(self._kept, rows, strict=True):
            kept[slots.to(kept.device)] = row


def _filled(values: Tensor, slots: Tensor, new: Tensor) -> Tensor:
    """`values`, lengthened where need be, with `new` in the places `slots`."""
    longer = int(slots.max()) + 1 - len(values) if len(slots) else 0
    found = torch.cat([values, values.new_zeros(max(0, longer))])
    found[slots] = new
    return found
