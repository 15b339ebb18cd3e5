"""A streamed run that learns from text: layer by layer, with the hidden states of the text carried along.

Each layer is read, run on the hidden states, its FFNs are reduced by what has passed through them, written, and let go.
Statistics are those that :func:`mlp_fusion.calibration.collect` gathers in a model that is in memory as a whole, and,
sequentially, those of :mod:`mlp_fusion.reducing.sequential`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mlp_fusion.calibration.statistics import FFNStatistics, take_calibration, warn_of_few
from mlp_fusion.families import Architecture, FFNSite
from mlp_fusion.neurons import UNNAMED, NeuronBundle
from mlp_fusion.reducing.chosen import self_test
from mlp_fusion.reducing.layers import Call, Layer, hidden_of, run_layer, run_streamed
from mlp_fusion.reducing.learning import SAMPLE_ROWS, sampled_rows, with_sensitivity
from mlp_fusion.reducing.pipeline import Recipe, ReducedFFN, reduce_ffns, with_enough_tokens
from mlp_fusion.reducing.rows import fused_row
from mlp_fusion.reducing.sequential import SequentialReduction
from mlp_fusion.running.batches import Batch, token_mask
from mlp_fusion.running.sampling import RowPlan, RowSample
from mlp_fusion.running.taps import Activations, Taps
from mlp_fusion.store.shards import flush
from mlp_fusion.streaming.layerwise import LayerwiseModel
from mlp_fusion.streaming.passing import Passing
from mlp_fusion.streaming.sensing import Gradients, write_tensors
from mlp_fusion.streaming.tasks import Part, Task
from mlp_fusion.streaming.work import Member, Outcome, Work

#: Bytes of moments that the experts of a layer gather at once; the layer runs again for the others.
_MOMENT_BYTES = 2 * 2**30

#: Called with what a layer is called in the journal, and the rows of its FFNs.
Done = Callable[[str, list[Member]], None]


@dataclass
class Calibrated:
    """A calibrated run over the layers.

    Attributes:
        work: where FFNs lie and are written to.
        architecture: of the model.
        batches: the calibration text.
        sequential: calibrate on what the reduced FFNs make of it.
        states_file: where hidden states are kept for a run that goes on.
        gradients: what files of gradients are called.
        may_skip: go without gradients where the model does not allow them.
        sensed: FFNs at whose outputs gradients are taken, before any is reduced.
    """

    work: Work
    architecture: Architecture
    batches: Sequence[Batch]
    sequential: bool
    states_file: Path
    gradients: Path
    may_skip: bool = False
    _model: LayerwiseModel = field(init=False)
    _gradients: Gradients = field(init=False)
    _sites: list[FFNSite] = field(init=False)
    sensed: list[FFNSite] = field(init=False)
    _warned: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        w = self.work
        self._model = LayerwiseModel(w.source, w.config, w.dtype, w.device)
        self.batches = take_calibration(self._model.model, list(self.batches))
        settings = w.settings
        self._plan = RowPlan(self.batches, settings.seed)
        self._recipe = Recipe.of(settings)
        self._gradients = Gradients(self.gradients, w.device)
        self._numbers = {ffn.index: number for number, ffn in enumerate(w.ffns) if ffn.loaded}
        self._sites = self.architecture.sites(self._model.model)
        self.sensed = [site for site in self._sites if self._is_sensed(site)]

    @torch.no_grad()
    def run(self, finished: set[str], done: Done, sensing: Callable[[float], None]) -> None:
        """Reduce what is not `finished`, layer by layer.

        Args:
            finished: what layers are called that are done.
            done: called for each of the others.
            sensing: called with the share of the gradients that is there.

        Raises:
            InputError: the model cannot be run layer by layer, or not on the text; or an FFN is not what it seems.
        """
        settings = self.work.settings
        chosen: set[int] = set(settings.layers)  # type: ignore[arg-type]
        stacks = self._model.stacks(self._sites, self.batches[0], chosen)
        order = [layer for stack in stacks for layer in stack]
        last = max(n for n, layer in enumerate(order) if any(site.index in chosen for site in layer.sites))
        left = [n for n, layer in enumerate(order[: last + 1]) if layer.path not in finished]
        if not left:
            return
        if self.sensed:
            self._gradients.gather(
                self._model, stacks, self.architecture, self.sensed, self.batches,
                seed=settings.seed, may_skip=self.may_skip, progress=sensing,
            )  # fmt: skip
        at = self._resumed()
        if at is None or not 0 < at.layer <= left[0]:
            at = _Carried(0, [], [], [], [])
        begin = 0
        for stack in stacks:
            if begin <= last and at.layer < begin + len(stack):
                self._stack(stacks, at, begin, min(last + 1 - begin, len(stack)), done, ends=begin + len(stack) <= last)
            begin += len(stack)

    def _is_sensed(self, site: FFNSite) -> bool:
        """Whether errors of an FFN's outputs are weighed by what they do to the model."""
        settings = self.work.settings
        return settings.weighs_outputs and not site.is_routed and site.index in settings.layers  # type: ignore[operator]

    def _known(self, site: FFNSite, statistics: FFNStatistics) -> FFNStatistics:
        """All that is known of an FFN."""
        found = self._gradients.sensitivity(site) if self._is_sensed(site) else None
        return with_enough_tokens(site, with_sensitivity(statistics, found))

    def _stack(
        self, stacks: Sequence[Sequence[Layer]], at: _Carried, begin: int, length: int, done: Done, *, ends: bool
    ) -> None:
        """Go on from `at` in a stack, for `length` layers.

        Args:
            stacks: all.
            at: where; it goes along.
            begin: number of the stack's first layer.
            length: of the stack, or up to the last layer that is wanted.
            done: as of :meth:`run`.
            ends: whether another stack is to follow.
        """
        stack = stacks[len(at.ends)]
        calls = self._model.record(stacks, self.batches, at.ends)
        calls_now = calls
        if self.sequential and at.ends:
            calls_now = self._model.record(stacks, self.batches, at.ends_now)
        if at.layer == begin:
            at.exact, at.states = ([hidden_of(call) for call in found[0]] for found in (calls, calls_now))
        for number in range(at.layer - begin, length):
            layer = stack[number]
            with self._model.loaded(layer), self._model.checked(layer, stack):
                members = [site for site in layer.sites if site.index in self.work.settings.layers]  # type: ignore[operator]
                found = self._layer(layer, members, calls[number], calls_now[number], at)
                outcome = self._outcome(members, found)
            flush(self.work.write(Task(layer.path), outcome))
            done(layer.path, outcome.rows)
            at.layer += 1
            more = number + 1 < length
            if not more and ends:
                at.ends.append(at.exact)
                at.ends_now.append(at.states)
                at.exact, at.states = [], []
            # After the journal: states that lag behind it have a layer done again, and nothing is lost.
            if more or ends:
                self._keep(at)

    # --- one layer ---------------------------------------------------------------------------------------------------

    def _layer(
        self, layer: Layer, members: Sequence[FFNSite], calls: Sequence[Call], calls_now: Sequence[Call], at: _Carried
    ) -> list[_Reduced]:
        """What becomes of a layer's FFNs; its outputs are carried on.

        Args:
            layer: it.
            members: those of its FFNs that are reduced.
            calls, calls_now: what it is called with, in the original model and in the reduced one.
            at: the hidden states that it gets, and then those that it puts out.
        """
        experts = [expert for site in members for expert in site.experts()]
        read = {site.index: self.architecture.read(site) for site in members}
        originals = [read[s.index] if s.expert is None else read[s.index].select(s.expert) for s in experts]
        widths = [self.work.widths[self._numbers[site.index]] for site in experts]
        if experts and not self._warned and self.work.settings.refit:
            tokens = sum(int(token_mask(batch).sum()) for batch in self.batches)
            warn_of_few(tokens, [bundle.w_in for bundle in originals], self.work.settings.calibration_rows)
            self._warned = True
        if self.sequential:
            reduce = functools.partial(self._reduce_one, experts, originals, widths)
            run = SequentialReduction(
                self.architecture, experts, self.batches, reduce, self._plan, self.work.settings.calibration_rows
            )
            shown = self._shown(layer, experts, calls, at.exact)
            pairs = zip(calls, at.exact, strict=True)
            exact = [run_streamed(self.architecture, layer, call, hidden) for call, hidden in pairs]
            at.exact = [output for output, _ in exact]
            at.states = run.step(layer, calls_now, at.states, [stream for _, stream in exact])
            found = [run.results[number] for number in range(len(experts))]
        else:
            known: list[FFNStatistics] = []
            for some in _in_turns(experts, originals):
                known += self._statistics(layer, some, calls, at.exact)
            enough = [self._known(*pair) for pair in zip(experts, known, strict=True)]
            found = reduce_ffns(self._recipe, originals, widths, enough) if experts else []
            shown = [sampled_rows(statistics, self.work.settings.seed) for statistics in known]
            at.exact = [run_layer(layer, call, x) for call, x in zip(calls, at.exact, strict=True)]
            at.states = at.exact
        return [_Reduced(*four) for four in zip(experts, originals, shown, found, strict=True)]

    def _reduce_one(
        self,
        experts: Sequence[FFNSite],
        originals: Sequence[NeuronBundle],
        widths: Sequence[int],
        number: int,
        statistics: FFNStatistics,
    ) -> ReducedFFN:
        known = self._known(experts[number], statistics)
        return reduce_ffns(self._recipe, [originals[number]], [widths[number]], [known])[0]

    def _statistics(
        self, layer: Layer, experts: Sequence[FFNSite], calls: Sequence[Call], hidden: Sequence[Tensor]
    ) -> list[FFNStatistics]:
        """What passes through some FFNs of a layer."""
        passing = Passing(self.architecture, layer, self.batches, calls, hidden)
        return passing.statistics(experts, self._plan, self.work.settings.calibration_rows)

    def _shown(
        self, layer: Layer, experts: Sequence[FFNSite], calls: Sequence[Call], hidden: Sequence[Tensor]
    ) -> list[Activations]:
        """Rows of some FFNs of a layer, to measure errors on."""
        kept = [RowSample(self._plan, SAMPLE_ROWS) for _ in experts]

        def visit(number: int, mask: Tensor, taps: Taps) -> None:
            counted = mask.to(taps.x.device)
            kept[number].add(mask, taps.x[counted], taps.y[counted])

        Passing(self.architecture, layer, self.batches, calls, hidden).show(experts, visit)
        return [
            Activations(*sample.finish(may_be_empty=site.is_expert)[0])
            for site, sample in zip(experts, kept, strict=True)
        ]

    def _outcome(self, members: Sequence[FFNSite], reduced: Sequence[_Reduced]) -> Outcome:
        outcome = Outcome([], [], [])
        for one in reduced:
            rows = one.rows
            if one.original.activation != UNNAMED and len(rows.x):
                self_test(self.architecture, one.site, one.original, rows)
            row = fused_row(one.site, one.original, one.found, self.work.settings.parameterization, rows)
            outcome.rows.append((self._numbers[one.site.index], row, len(rows.x)))
        for site in members:
            number = self._numbers[site.index]
            found = [one.found for one in reduced if one.site.index == site.index]
            for piece in self.work.ffns[number].pieces:
                part = Part(number, piece, 0, piece.experts)
                self.work.gather(outcome, part, found[piece.first : piece.first + piece.experts])
        return outcome

    # --- going on ----------------------------------------------------------------------------------------------------

    def _keep(self, at: _Carried) -> None:
        """Keep the hidden states that the next layer gets, and those that stacks have ended with."""
        held = at.tensors(sequential=self.sequential)
        unfinished = self.states_file.with_name(f"{self.states_file.name}.new")
        tensors = {name: tensor.cpu().contiguous() for name, tensor in held.items()}
        write_tensors(tensors, unfinished, metadata={"layer": str(at.layer), "ends": str(len(at.ends))})
        flush([unfinished])
        unfinished.rename(self.states_file)

    def _resumed(self) -> _Carried | None:
        """Where hidden states are kept for, and they; None where there are none that can be read."""
        try:
            with safe_open(self.states_file, framework="pt") as handle:
                layer, ends = (int(handle.metadata()[name]) for name in ("layer", "ends"))
                held = {name: handle.get_tensor(name).to(self.work.device) for name in handle.keys()}  # noqa: SIM118

            def of(name: str) -> list[Tensor]:
                # Behind the last layer of a stack, there are none to go on with.
                return [held[f"{name}.{n}"] for n in range(len(self.batches))] if f"{name}.0" in held else []

            now = "states" if self.sequential else "exact"
            each = [[of(f"{name}.{n}") for n in range(ends)] for name in ("exact.end", f"{now}.end")]
            return _Carried(layer, of("exact"), of(now), *each)
        except (OSError, SafetensorError, KeyError):
            return None  # layers are done again


@dataclass
class _Carried:
    """How far a run has come.

    Attributes:
        layer: number of the next one.
        exact, states: the hidden states that it gets, in the original model and in the reduced one, per batch; none for
            the first of a stack.
        ends, ends_now: those that each stack before has ended with.
    """

    layer: int
    exact: list[Tensor]
    states: list[Tensor]
    ends: list[list[Tensor]]
    ends_now: list[list[Tensor]]

    def tensors(self, *, sequential: bool) -> dict[str, Tensor]:
        """All by name, to be kept; those of the reduced model where they are others."""
        found = {"exact": self.exact, **{f"exact.end.{n}": end for n, end in enumerate(self.ends)}}
        if sequential:
            found |= {"states": self.states, **{f"states.end.{n}": end for n, end in enumerate(self.ends_now)}}
        return {f"{name}.{n}": tensor for name, each in found.items() for n, tensor in enumerate(each)}


@dataclass(frozen=True)
class _Reduced:
    """An FFN, or an expert, before and after, and rows to measure the difference on."""

    site: FFNSite
    original: NeuronBundle
    rows: Activations
    found: ReducedFFN


def _in_turns(experts: Sequence[FFNSite], originals: Sequence[NeuronBundle]) -> Iterator[list[FFNSite]]:
    """As many FFNs at once as memory for their moments allows."""
    turn: list[FFNSite] = []
    size = 0
    for site, bundle in zip(experts, originals, strict=True):
        needed = 8 * (bundle.w_in.shape[2] + 1) ** 2
        if turn and size + needed > _MOMENT_BYTES:
            yield turn
            turn, size = [], 0
        turn.append(site)
        size += needed
    if turn:
        yield turn
