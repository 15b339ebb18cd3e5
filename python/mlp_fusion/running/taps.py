"""What goes into and comes out of each FFN while the model runs, and an FFN replaced while it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlp_fusion.errors import InputError
from mlp_fusion.families import Architecture, FFNSite
from mlp_fusion.families.exchange import narrowed
from mlp_fusion.neurons import UNNAMED, NeuronBundle
from mlp_fusion.running.batches import POOL, Batch, take_batches, token_mask
from mlp_fusion.running.expert_taps import experts_tapped
from mlp_fusion.running.runner import Runner, not_finite

#: Called as `visit(site number, token mask (batch, length), taps)`; see :func:`stream_activations`.
Visitor = Callable[[int, Tensor, "Taps"], None]


@dataclass(frozen=True, eq=False)
class Activations:
    """Rows of one FFN: inputs `x (T, d)` and the model's own outputs `y (T, d_out)`, in the model's dtype."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True, eq=False)
class Taps:
    """What passes through one FFN on one batch, padding included, in the model's dtype and on its device.

    Attributes:
        x: `(batch, length, d)` inputs.
        hidden: `(batch, length, N)` what the output projection gets: the activations, gated where the FFN is.
        y: `(batch, length, d_out)` outputs of the output projection.
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
            taps.start(token_mask(batch))
            runner.base(batch)
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
    """Run `model` over `sample` and keep up to `rows` token positions of every FFN in `sites`.

    The same positions are kept at every FFN, drawn uniformly from those that the attention masks leave. Memory: `rows`
    rows per FFN and one batch's activations. The model is put in evaluation mode for the run and back afterwards.

    Returns:
        One `Activations` per site, in their order.

    Raises:
        InputError: the sample has no token, or an FFN did not run, or overflows.
    """
    batches = take_batches(sample, POOL * rows)
    total = sum(int(token_mask(b).sum()) for b in batches)
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:rows]] = True
    kept: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in sites]
    starts = [0] * len(sites)

    def keep(number: int, mask: Tensor, taps: Taps) -> None:
        count = int(mask.sum())
        positions = torch.zeros_like(mask)
        positions[mask] = chosen[starts[number] : starts[number] + count]
        starts[number] += count
        for store, rows_of in zip(kept[number], (taps.x, taps.y), strict=True):
            store.append(rows_of[positions.to(rows_of.device)].clone())

    stream_activations(model, architecture, sites, batches, keep)
    found = [Activations(torch.cat(xs), torch.cat(ys)) for xs, ys in kept]
    for site, rows_of in zip(sites, found, strict=True):
        if not bool(rows_of.x.isfinite().all() and rows_of.y.isfinite().all()):
            raise not_finite(f"{site.path}: this FFN's inputs or outputs", rows_of.y.dtype)
    return found


@contextmanager
def tapped(architecture: Architecture, sites: Sequence[FFNSite], visit: Visitor) -> Iterator[TapStore]:
    """Show `visit` what passes through the FFNs in `sites` while the modules run inside; see :class:`TapStore`."""
    taps = TapStore(visit, len(sites))
    handles = []
    experts = {number: site for number, site in enumerate(sites) if site.expert is not None}
    for number, site in enumerate(sites):
        if number in experts:
            continue
        w_in, w_out = (architecture.projection(site, role) for role in ("w_in", "w_out"))
        handles.append(w_in.register_forward_pre_hook(taps.before("x", number)))
        handles.append(w_out.register_forward_pre_hook(taps.before("hidden", number)))
        handles.append(w_out.register_forward_hook(taps.after("y", number)))
    try:
        with experts_tapped(experts, taps.complete):
            yield taps
    finally:
        for handle in handles:
            handle.remove()


class TapStore:
    """Collects the calls of one FFN at a time; `start` every batch and `finish` it.

    A model that chunks its FFN (`chunk_size_feed_forward`) calls it several times, along the sequence: an FFN is
    complete when another one begins, or the batch ends.
    """

    def __init__(self, visit: Visitor, sites: int) -> None:
        self._visit, self._sites = visit, sites
        self._current: int | None = None
        self._parts: dict[str, list[Tensor]] = {}
        self._mask = torch.empty(0)
        self._seen = 0

    def start(self, mask: Tensor) -> None:
        """Begin a batch with the `(batch, length)` token mask."""
        self._mask, self._seen, self._current = mask, 0, None

    def before(self, name: str, number: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: self._add(name, number, args[0])

    def after(self, name: str, number: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _module, _args, y: self._add(name, number, y)

    def complete(self, number: int, x: Tensor, hidden: Tensor, y: Tensor) -> None:
        """All rows of an FFN at once, an expert's: those that were routed to it, `(rows, channels)` each."""
        self._flush()
        mask = torch.ones(1, len(x), dtype=torch.bool)
        self._visit(number, mask, Taps(x.unsqueeze(0), hidden.unsqueeze(0), y.unsqueeze(0)))
        self._seen += 1

    def finish(self) -> None:
        """End the batch.

        Raises:
            InputError: an FFN did not run.
        """
        self._flush()
        if self._seen != self._sites:
            raise InputError("an FFN did not run on the sample: the model skips it")

    def _add(self, name: str, number: int, tensor: Tensor) -> None:
        if number != self._current:
            self._flush()
            self._current, self._parts = number, {"x": [], "hidden": [], "y": []}
        self._parts[name].append(tensor)

    def _flush(self) -> None:
        if self._current is None:
            return
        if not all(self._parts.values()):
            raise InputError("an FFN did not run on the sample: the model skips it")
        batch = len(self._mask)
        joined = {k: torch.cat([p.reshape(batch, -1, p.shape[-1]) for p in v], 1) for k, v in self._parts.items()}
        self._visit(self._current, self._mask, Taps(**joined))
        self._current, self._parts = None, {}
        self._seen += 1


@contextmanager
def replaced(architecture: Architecture, site: FFNSite, bundle: NeuronBundle) -> Iterator[None]:
    """While inside, the FFN at `site` outputs what `bundle` does; its own weights are back afterwards.

    Args:
        architecture: of the model.
        site: a dense FFN, or a whole stack of experts.
        bundle: with B = 1, or the number of experts.
    """
    if site.kind.experts or bundle.activation == UNNAMED:
        with narrowed(site, bundle):
            yield
        return
    pending: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        pending.append(args[0])

    def replace(_module: nn.Module, _args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        x = pending.pop()
        return bundle.forward(x.reshape(-1, x.shape[-1]).to(bundle.w_in.dtype))[0].reshape(y.shape).to(y.dtype)

    handles = [
        architecture.projection(site, "w_in").register_forward_pre_hook(keep),
        architecture.projection(site, "w_out").register_forward_hook(replace),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
