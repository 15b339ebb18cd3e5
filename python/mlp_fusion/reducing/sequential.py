"""Sequential calibration: every FFN is calibrated on what the FFNs before it, already reduced, make of the text.

The model runs once, to catch what each layer is called with and puts out; then the layers run one by one on hidden
states, each with its own FFNs to gather statistics and with the reduced ones to make the next layer's input. Where
something else lies between two layers (an encoder's end and a decoder's beginning, a merging of patches), the model
runs twice more to show what the next ones are called with, as it was and with the FFNs reduced so far. The model is as
it was afterwards.

An FFN's outputs are added to a residual stream, which the reduced FFNs before have bent. Its targets are therefore not
what the original FFN makes of the bent inputs, but what leads the stream back to the original model's:

    target = its outputs + a (original stream after the FFN - stream at hand after the FFN),        a = 2/3

With a = 1 the targets are all that it would take; but most of what earlier FFNs have bent, an FFN cannot see in its
inputs, and a fit to it on few tokens is a fit to chance. On SmolLM2 at half width, perplexity was 17 % higher with
a = 0 than with a = 1/2, and 3 % higher with a = 1; a parabola through these is least at 2/3.

Where outputs are normalised before they are added (Gemma 2), this comes to what the original FFN put out in the
original model. FFNs that share a layer, experts among them, are fitted to what they put out themselves.

Source: matching the full model's outputs on the reduced model's inputs is the asymmetric calibration of "GPTAQ" (Li et
al., ICML 2025, arXiv 2504.02692), there for single weight matrices; the residual stream's part in the target is this
project's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mlp_fusion.calibration.statistics import FFNStatistics, collector_of, take_calibration
from mlp_fusion.errors import SkippableError
from mlp_fusion.families import Architecture, FFNSite
from mlp_fusion.families.exchange import narrowed
from mlp_fusion.neurons import NeuronBundle
from mlp_fusion.reducing.layers import (
    Call,
    Layer,
    Recorder,
    Streamed,
    hidden_of,
    layers_of,
    run_layer,
    run_streamed,
    segments,
)
from mlp_fusion.reducing.pipeline import ReducedFFN
from mlp_fusion.running.batches import Batch
from mlp_fusion.running.positions import by_sequence
from mlp_fusion.running.runner import Runner
from mlp_fusion.running.sampling import RowPlan
from mlp_fusion.running.taps import Taps, tapped

#: The share a of the streams' difference that an FFN is to make up for.
_CORRECTED = 2.0 / 3.0


@torch.no_grad()
def reduce_sequentially(
    model: nn.Module,
    architecture: Architecture,
    sites: Sequence[FFNSite],
    calibration: Batch | Iterable[Batch],
    reduce: Callable[[int, FFNStatistics], ReducedFFN],
    *,
    seed: int,
    rows: int | None = None,
) -> list[ReducedFFN]:
    """Reduce the FFNs in `sites` one after the other; `reduce(number, statistics)` does one.

    The outputs `y` in the statistics are the targets that this module's docstring gives. `rows` and the length of the
    text are as in :func:`mlp_fusion.calibration.collect`.

    Memory beside the model: three times the hidden states of all calibration tokens at one layer, those at all layers
    if they fit into 2 GiB, and the statistics of one layer's FFNs (see :func:`mlp_fusion.calibration.collect`). Time:
    three runs of the model, another one where the hidden states do not fit, and two more for each break in the chain
    of layers.

    Raises:
        InputError: the calibration text cannot be used, or a layer is called in a way that cannot be repeated.
    """
    batches = take_calibration(model, calibration)
    plan = RowPlan(batches, seed)
    layers = _layers(model, architecture, sites)
    run = SequentialReduction(architecture, sites, batches, reduce, plan, rows)
    with Runner(model, "the calibration text") as runner:
        recorded = Recorder(layers, architecture).run(runner, batches)
        for number, members in enumerate(segments(recorded.order, recorded.chained)):
            inside = [layers[n] for n in members]
            known = [None if recorded.outputs is None else recorded.outputs[n] for n in members]
            if number == 0:
                original = reduced = [recorded.calls[n] for n in members]
            else:
                original = Recorder(inside).run(runner, batches).calls
                with run.replaced():
                    reduced = Recorder(inside).run(runner, batches).calls
            run.segment(inside, original, reduced, known)
    return [run.results[number] for number in range(len(sites))]


@torch.no_grad()
def check_sequence(
    model: nn.Module, architecture: Architecture, sites: Sequence[FFNSite], batches: Sequence[Batch]
) -> None:
    """Raise SkippableError where layers of the FFNs in `sites` cannot be run one by one, as the first batch shows."""
    with Runner(model, "the calibration text") as runner:
        Recorder(_layers(model, architecture, sites)).run(runner, batches[:1])


def _layers(model: nn.Module, architecture: Architecture, sites: Sequence[FFNSite]) -> list[Layer]:
    """The layers from the first of the FFNs in `sites` to the last.

    Raises:
        SkippableError: one is inside another.
    """
    chosen = {site.index for site in sites}
    first, last = min(chosen), max(chosen)
    layers = layers_of(model, [site for site in architecture.sites(model) if first <= site.index <= last])
    for outer in layers:
        for inner in layers:
            if inner.path.startswith(f"{outer.path}."):
                raise SkippableError(
                    f"{inner.path} is inside of {outer.path}, which sequential calibration cannot repeat: give "
                    "sequential=False (--no-sequential)"
                )
    return layers


@dataclass
class SequentialReduction:
    """What has been reduced so far, and how to go on.

    Attributes:
        architecture, sites, batches, reduce, rows: as of :func:`reduce_sequentially`.
        plan: of the rows that are kept.
    """

    architecture: Architecture
    sites: Sequence[FFNSite]
    batches: Sequence[Batch]
    reduce: Callable[[int, FFNStatistics], ReducedFFN]
    plan: RowPlan
    rows: int | None
    #: Number of an FFN among `sites` -> what became of it; FFNs (stacks of experts in one) and their bundles.
    results: dict[int, ReducedFFN] = field(default_factory=dict)
    done: list[tuple[FFNSite, NeuronBundle]] = field(default_factory=list)

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Inside, the model runs with the FFNs reduced so far."""
        with ExitStack() as stack:
            for site, bundle in self.done:
                stack.enter_context(narrowed(site, bundle))
            yield

    def segment(
        self,
        layers: Sequence[Layer],
        original: list[list[Call]],
        reduced: list[list[Call]],
        known: Sequence[list[Streamed] | None],
    ) -> None:
        """Reduce the FFNs of layers that feed one another.

        Args:
            layers: they.
            original, reduced: per layer and batch, what it is called with in the original model and in the one with the
                FFNs reduced so far; hidden states of the first layer only.
            known: per layer, what it puts out in the original model, if that was kept. It is given back as it is used.
        """
        exact, states = ([hidden_of(call) for call in calls[0]] for calls in (original, reduced))
        for layer, calls, calls_now, found in zip(layers, original, reduced, known, strict=True):
            pairs = zip(calls, exact, strict=True)
            runs = found or [run_streamed(self.architecture, layer, call, x) for call, x in pairs]
            exact = [output for output, _ in runs]
            states = self.step(layer, calls_now, states, [stream for _, stream in runs])
            runs.clear()

    def step(
        self, layer: Layer, calls: Sequence[Call], states: Sequence[Tensor], wanted: Sequence[Tensor]
    ) -> list[Tensor]:
        """Reduce the FFNs of a layer.

        Args:
            layer: it.
            calls: per batch, what it is called with besides hidden states.
            states: its hidden states with the FFNs reduced so far.
            wanted: the original model's streams.

        Returns:
            The hidden states of the next layer.
        """
        indices = {site.index for site in layer.sites}
        numbers = [number for number, site in enumerate(self.sites) if site.index in indices]
        with ExitStack() as stack:
            if numbers:
                for statistics, number in self._statistics(layer, numbers, calls, states, wanted):
                    self.results[number] = self.reduce(number, statistics)
                for pair in self._reduced(layer, numbers):
                    self.done.append(pair)
                    stack.enter_context(narrowed(*pair))
            return [run_layer(layer, call, x) for call, x in zip(calls, states, strict=True)]

    def _reduced(self, layer: Layer, numbers: Sequence[int]) -> Iterator[tuple[FFNSite, NeuronBundle]]:
        for site in layer.sites:
            bundles = [self.results[n].bundle for n in numbers if self.sites[n].index == site.index]
            if bundles:
                yield site, NeuronBundle.stack(bundles)

    def _statistics(
        self,
        layer: Layer,
        numbers: Sequence[int],
        calls: Sequence[Call],
        states: Sequence[Tensor],
        wanted: Sequence[Tensor],
    ) -> Iterator[tuple[FFNStatistics, int]]:
        """Statistics of a layer's FFNs on `states`; of one alone, with targets that lead to the streams `wanted`."""
        sites = [self.sites[n] for n in numbers]
        collectors = [collector_of(self.architecture, site, self.plan, self.rows) for site in sites]
        seen: list[tuple[int, Tensor, Taps]] = []
        with tapped(self.architecture, sites, lambda *found: seen.append(found)) as taps:
            for call, hidden, stream, batch in zip(calls, states, wanted, self.batches, strict=True):
                taps.start(batch)
                _, present = run_streamed(self.architecture, layer, call, hidden)
                taps.finish()
                for number, mask, found in seen:
                    chosen = mask.to(found.x.device)
                    y, beyond = found.y[chosen], None
                    if len(sites) == 1:
                        streams = {"wanted": [stream], "present": [present]}
                        beyond = _beyond(y, streams, batch, sites[0].path)
                    target = y if beyond is None else y + beyond
                    collectors[number].add(mask, found.x[chosen], found.hidden[chosen], target, beyond)
                seen.clear()
        for collector, number in zip(collectors, numbers, strict=True):
            yield collector.finish(), number


def _beyond(y: Tensor, streams: dict[str, list[Tensor]], batch: Batch, path: str) -> Tensor | None:
    """What an FFN should put out beyond its outputs `y` for the stream at hand to become the one that is wanted.

    None where the layer goes on to something of another shape (a merging of patches).
    """
    working = torch.promote_types(y.dtype, torch.float32)
    # The layer may have another form than what the FFN sees: as many rows, in the same order.
    mask, found = by_sequence(streams, batch, path)
    wanted, present = (found[name][mask.to(y.device)].to(working) for name in ("wanted", "present"))
    return None if wanted.shape != y.shape else (_CORRECTED * (wanted - present)).to(y.dtype)
