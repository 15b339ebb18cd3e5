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
from safetensors.torch import save_file
from torch import Tensor

from mlp_fusion.calibration.statistics import FFNStatistics, adding_to, collector_of, take_calibration
from mlp_fusion.families import Architecture, FFNSite
from mlp_fusion.neurons import UNNAMED, NeuronBundle
from mlp_fusion.reducing.chosen import self_test
from mlp_fusion.reducing.layers import Call, Layer, hidden_of, run_layer
from mlp_fusion.reducing.learning import SAMPLE_ROWS, sampled_rows
from mlp_fusion.reducing.pipeline import Recipe, ReducedFFN, reduce_ffns, with_enough_tokens
from mlp_fusion.reducing.rows import fused_row
from mlp_fusion.reducing.sequential import SequentialReduction
from mlp_fusion.running.batches import Batch
from mlp_fusion.running.sampling import RowPlan, RowSample
from mlp_fusion.running.taps import Activations, Taps, Visitor, tapped
from mlp_fusion.store.shards import flush
from mlp_fusion.streaming.layerwise import LayerwiseModel
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
    """

    work: Work
    architecture: Architecture
    batches: Sequence[Batch]
    sequential: bool
    states_file: Path
    _model: LayerwiseModel = field(init=False)

    def __post_init__(self) -> None:
        w = self.work
        self._model = LayerwiseModel(w.source, w.config, w.dtype, w.device)
        self.batches = take_calibration(self._model.model, list(self.batches))
        settings = w.settings
        self._plan = RowPlan(self.batches, settings.seed)
        self._recipe = Recipe.of(settings)
        self._numbers = {ffn.index: number for number, ffn in enumerate(w.ffns) if ffn.loaded}

    @torch.no_grad()
    def run(self, finished: set[str], done: Done) -> None:
        """Reduce what is not `finished`, layer by layer.

        Raises:
            InputError: the model cannot be run layer by layer, or not on the text; or an FFN is not what it seems.
        """
        sites = self.architecture.sites(self._model.model)
        layers = self._model.stack(sites)
        chosen = set(self.work.settings.layers)  # type: ignore[arg-type]
        last = max(n for n, layer in enumerate(layers) if any(site.index in chosen for site in layer.sites))
        left = [n for n, layer in enumerate(layers[: last + 1]) if layer.path not in finished]
        if not left:
            return
        calls = self._model.record(layers, self.batches).calls
        exact = [hidden_of(call) for call in calls[0]]
        first, states = 0, exact
        resumed = self._resumed()
        if resumed is not None and 0 < resumed[0] <= left[0]:
            first, exact, states = resumed
        for number in range(first, last + 1):
            layer = layers[number]
            with self._model.loaded(layer):
                members = [site for site in layer.sites if site.index in chosen]
                exact, states, found = self._layer(layer, members, calls[number], exact, states)
                outcome = self._outcome(members, found)
            flush(self.work.write(Task(layer.path), outcome))
            done(layer.path, outcome.rows)
            # After the journal: states that lag behind it have a layer done again, and nothing is lost.
            if number < last:
                self._keep(number + 1, exact, states)

    # --- one layer ---------------------------------------------------------------------------------------------------

    def _layer(
        self, layer: Layer, members: Sequence[FFNSite], calls: Sequence[Call], exact: list[Tensor], states: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[_Reduced]]:
        """The next hidden states, of the original model and of the reduced one, and what became of a layer's FFNs."""
        experts = [expert for site in members for expert in site.experts()]
        read = {site.index: self.architecture.read(site) for site in members}
        originals = [read[s.index] if s.expert is None else read[s.index].select(s.expert) for s in experts]
        widths = [self.work.widths[self._numbers[site.index]] for site in experts]
        if self.sequential:
            reduce = functools.partial(self._reduce_one, experts, originals, widths)
            run = SequentialReduction(
                self.architecture, experts, self.batches, reduce, self._plan, self.work.settings.calibration_rows
            )
            shown = self._shown(layer, experts, calls, exact)
            exact, states = run.step(layer, calls, calls, exact, states)
            found = [run.results[number] for number in range(len(experts))]
        else:
            known: list[FFNStatistics] = []
            for some in _in_turns(experts, originals):
                known += self._statistics(layer, some, calls, exact)
            enough = [with_enough_tokens(*pair) for pair in zip(experts, known, strict=True)]
            found = reduce_ffns(self._recipe, originals, widths, enough) if experts else []
            shown = [sampled_rows(statistics, self.work.settings.seed) for statistics in known]
            exact = [run_layer(layer, call, x) for call, x in zip(calls, exact, strict=True)]
            states = exact
        return exact, states, [_Reduced(*four) for four in zip(experts, originals, shown, found, strict=True)]

    def _reduce_one(
        self,
        experts: Sequence[FFNSite],
        originals: Sequence[NeuronBundle],
        widths: Sequence[int],
        number: int,
        statistics: FFNStatistics,
    ) -> ReducedFFN:
        known = with_enough_tokens(experts[number], statistics)
        return reduce_ffns(self._recipe, [originals[number]], [widths[number]], [known])[0]

    def _statistics(
        self, layer: Layer, experts: Sequence[FFNSite], calls: Sequence[Call], hidden: Sequence[Tensor]
    ) -> list[FFNStatistics]:
        """What passes through some FFNs of a layer."""
        rows = self.work.settings.calibration_rows
        collectors = [collector_of(self.architecture, site, self._plan, rows) for site in experts]
        self._run(layer, experts, calls, hidden, adding_to(collectors))
        return [collector.finish() for collector in collectors]

    def _shown(
        self, layer: Layer, experts: Sequence[FFNSite], calls: Sequence[Call], hidden: Sequence[Tensor]
    ) -> list[Activations]:
        """Rows of some FFNs of a layer, to measure errors on."""
        kept = [RowSample(self._plan, SAMPLE_ROWS) for _ in experts]

        def visit(number: int, mask: Tensor, taps: Taps) -> None:
            counted = mask.to(taps.x.device)
            kept[number].add(mask, taps.x[counted], taps.y[counted])

        self._run(layer, experts, calls, hidden, visit)
        return [
            Activations(*sample.finish(may_be_empty=site.is_expert)[0])
            for site, sample in zip(experts, kept, strict=True)
        ]

    def _run(
        self, layer: Layer, experts: Sequence[FFNSite], calls: Sequence[Call], hidden: Sequence[Tensor], visit: Visitor
    ) -> None:
        """Run a layer on the text, and show what passes through its FFNs."""
        if not experts:
            return
        with tapped(self.architecture, experts, visit) as taps:
            for call, x, batch in zip(calls, hidden, self.batches, strict=True):
                taps.start(batch)
                run_layer(layer, call, x)
                taps.finish()

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

    def _keep(self, number: int, exact: Sequence[Tensor], states: Sequence[Tensor]) -> None:
        """Keep the hidden states that layer `number` gets."""
        held = {f"exact.{n}": t.cpu().contiguous() for n, t in enumerate(exact)}
        if self.sequential:
            held |= {f"states.{n}": t.cpu().contiguous() for n, t in enumerate(states)}
        unfinished = self.states_file.with_name(f"{self.states_file.name}.new")
        save_file(held, unfinished, metadata={"layer": str(number)})
        flush([unfinished])
        unfinished.rename(self.states_file)

    def _resumed(self) -> tuple[int, list[Tensor], list[Tensor]] | None:
        """The layer that hidden states are kept for, and they; None where there are none that can be read."""
        try:
            with safe_open(self.states_file, framework="pt") as handle:
                number = int(handle.metadata()["layer"])
                held = {name: handle.get_tensor(name).to(self.work.device) for name in handle.keys()}  # noqa: SIM118
            exact = [held[f"exact.{n}"] for n in range(len(self.batches))]
            return number, exact, [held[f"states.{n}"] for n in range(len(self.batches))] if self.sequential else exact
        except (OSError, SafetensorError, KeyError):
            return None  # layers are done again


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
