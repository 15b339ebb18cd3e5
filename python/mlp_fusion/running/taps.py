"""What goes into and comes out of each FFN while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlp_fusion.errors import InputError
from mlp_fusion.families import Architecture, FFNSite
from mlp_fusion.modules import Scaled
from mlp_fusion.running.batches import POOL, Batch, batches_of
from mlp_fusion.running.expert_taps import experts_tapped, going_on
from mlp_fusion.running.positions import by_sequence
from mlp_fusion.running.runner import Runner, not_finite
from mlp_fusion.running.sampling import RowPlan, RowSample

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
#: Called as `visit(site number, mask of the rows that count (sequences, positions, ...), taps)`; see
#: :func:`stream_activations` and, for the mask, :func:`mlp_fusion.running.positions.counted`.
Visitor = Callable[[int, Tensor, "Taps"], None]


@dataclass(frozen=True, eq=False)
class Activations:
    """Rows of one FFN: inputs `x (T, d)` and the model's own outputs `y (T, d_out)`, in the model's dtype."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True, eq=False)
class Taps:
    """What passes through one FFN on one batch, padding included, in the model's dtype and on its device.

    The leading dimensions are those of the mask: `(batch, length)` of text, whatever an FFN sees of anything else.

    Attributes:
        x: `(sequences, positions, ..., d)` inputs.
        hidden: `(..., N)` what the output projection gets: the activations, gated where the FFN is.
        y: `(..., d_out)` outputs of the output projection.
    """

    x: Tensor
    hidden: Tensor
    y: Tensor


@torch.no_grad()
def stream_activations(
    model: nn.Module,
    architecture: Architecture,
    sites: Sequence[FFNSite],
    batches: Sequence[Batch],
    visit: Visitor,
) -> None:
    """Run `model` once over `batches` and show `visit` what passes through every FFN in `sites`.

    Every FFN is visited once per batch, in the order in which the model runs them, and nothing is kept: at any time
    the tensors of one FFN on one batch are held. The model is put in evaluation mode for the run and back afterwards.

    Raises:
        InputError: the model cannot run on a batch, or an FFN did not run.
    """
    with Runner(model) as runner, tapped(architecture, sites, visit) as taps:
        for batch in batches:
            taps.start(batch)
            runner.base(batch, [site.path for site in sites])
            taps.finish()


def capture_activations(
    model: nn.Module,
    architecture: Architecture,
    sites: Sequence[FFNSite],
    sample: Batch | Iterable[Batch],
    *,
    rows: int,
    seed: int,
) -> list[Activations]:
    """Run `model` over `sample` and keep up to `rows` positions of every FFN in `sites`.

    Drawn uniformly from those that count, see :func:`mlp_fusion.running.positions.counted`: the same at every FFN that
    sees the sample's tokens, and at all that see as much of something else. Memory: `rows` rows per FFN and one batch's
    activations. The model is put in evaluation mode for the run and back afterwards.

    Returns:
        One `Activations` per site, in their order.

    Raises:
        InputError: the sample has no token, or an FFN did not run, or overflows.
    """
    batches = batches_of(model, sample, POOL * rows)
    plan = RowPlan(batches, seed)
    kept = [RowSample(plan, rows) for _ in sites]

    def keep(number: int, mask: Tensor, taps: Taps) -> None:
        counted = mask.to(taps.x.device)
        kept[number].add(mask, taps.x[counted], taps.y[counted])

    stream_activations(model, architecture, sites, batches, keep)
    found = [
        Activations(*sample.finish(may_be_empty=site.is_expert)[0]) for site, sample in zip(sites, kept, strict=True)
    ]
    for site, rows_of in zip(sites, found, strict=True):
        if not bool(rows_of.x.isfinite().all() and rows_of.y.isfinite().all()):
            raise not_finite(f"{site.path}: this FFN's inputs or outputs", rows_of.y.dtype)
    return found


@contextmanager
def tapped(architecture: Architecture, sites: Sequence[FFNSite], visit: Visitor) -> Iterator[TapStore]:
    """Show `visit` what passes through the FFNs in `sites` while the modules run inside; see :class:`TapStore`."""
    taps = TapStore(visit, sites)
    handles = []
    experts = {number: site for number, site in enumerate(sites) if site.expert is not None}
    for number, site in enumerate(sites):
        if number in experts:
            continue
        w_in, w_out = (architecture.projection(site, role) for role in ("w_in", "w_out"))
        handles.append(w_in.register_forward_pre_hook(taps.before("x", number)))
        handles.append(w_out.register_forward_pre_hook(taps.before("hidden", number)))
        handles.append(w_out.register_forward_hook(taps.after("y", number)))
        if site.kind.form == "module" and not isinstance(site.module, Scaled):
            handles.append(site.module.register_forward_hook(taps.whole(number)))
    try:
        with experts_tapped(experts, taps.complete, architecture.read):
            yield taps
    finally:
        for handle in handles:
            handle.remove()


class TapStore:
    """Collects the calls of FFNs; `start` every batch and `finish` it.

    A model that chunks its FFN (`chunk_size_feed_forward`) calls it several times, along the sequence, and one with two
    towers may begin an FFN of one before it ends that of the other: an FFN is complete when all of its calls have ended
    and another one begins, or the batch ends.
    """

    def __init__(self, visit: Visitor, sites: Sequence[FFNSite]) -> None:
        self._visit, self._sites = visit, sites
        #: Number of an FFN that has begun -> what has passed through it.
        self._parts: dict[int, dict[str, list[Tensor]]] = {}
        self._batch: Batch = {}
        self._seen: set[int] = set()
        #: Numbers of FFNs whose modules give something else than their output projections.
        self._going_on: set[int] = set()

    def start(self, batch: Batch) -> None:
        """Begin a batch."""
        self._batch = batch
        self._parts.clear()
        self._seen.clear()

    def before(self, name: str, number: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: self._add(name, number, channels_last(module, args[0]))

    def after(self, name: str, number: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        # A copy: some models add the residual to an FFN's outputs in place.
        return lambda module, _args, y: self._add(name, number, channels_last(module, y).clone())

    def whole(self, number: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        """Of a module that another one is to take the place of: what comes out has to be what its projection gives."""

        def compare(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            own = self._parts.get(number, {}).get("y", [])[-1:]
            same = isinstance(output, Tensor) and all(
                output.numel() == y.numel() and torch.equal(output.reshape(-1).to(y.device), y.reshape(-1)) for y in own
            )
            if not same and all(bool(y.isfinite().all()) for y in own):
                self._going_on.add(number)

        return compare

    def complete(self, number: int, x: Tensor, hidden: Tensor, y: Tensor) -> None:
        """All rows of an FFN at once, an expert's: those that were routed to it, `(rows, channels)` each."""
        self._flush(but=number)
        mask = torch.ones(1, len(x), dtype=torch.bool)
        self._visit(number, mask, Taps(x.unsqueeze(0), hidden.unsqueeze(0), y.unsqueeze(0)))
        self._seen.add(number)

    def finish(self) -> None:
        """End the batch.

        Raises:
            InputError: an FFN did not run, or does more than is known of it.
        """
        self._flush()
        if self._going_on:
            raise going_on(self._sites[min(self._going_on)])
        for number, site in enumerate(self._sites):
            if number in self._seen:
                continue
            if number in self._parts or not site.is_expert:
                raise InputError(
                    f"{site.path}: this FFN did not run on the sample: give inputs that reach it, or leave it out"
                )
            like = site.module.get_parameter(site.kind.parameters[0])
            self.complete(number, *(like.new_zeros(0, size) for size in site.channels()))

    def _add(self, name: str, number: int, tensor: Tensor) -> None:
        self._flush(but=number)
        self._parts.setdefault(number, {"x": [], "hidden": [], "y": []})[name].append(tensor)

    def _flush(self, but: int | None = None) -> None:
        """Show the FFNs all of whose calls have ended, `but` one that may be called again."""
        ended = [n for n, parts in self._parts.items() if n != but and len({len(p) for p in parts.values()}) == 1]
        for number in ended:
            mask, joined = by_sequence(self._parts.pop(number), self._batch, self._sites[number].path)
            self._visit(number, mask, Taps(**joined))
            self._seen.add(number)


def channels_last(module: nn.Module, values: Tensor) -> Tensor:
    """What goes into or comes out of a projection, channels last; pointwise convolutions have them behind the batch."""
    return values.movedim(1, -1) if isinstance(module, _CONVOLUTIONS) else values
