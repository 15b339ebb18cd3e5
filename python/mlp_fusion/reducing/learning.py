"""What is known of a model's FFNs before they are reduced: statistics, sensitivities, and rows to measure errors on."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlp_fusion.calibration import FFNStatistics, OutputSensitivity, collect, output_sensitivities
from mlp_fusion.calibration.sensitivity import warn_unweighed
from mlp_fusion.calibration.statistics import take_calibration, warn_of_few
from mlp_fusion.errors import InputError, SkippableError
from mlp_fusion.families import FFNSite
from mlp_fusion.measure.report import CalibrationRecord
from mlp_fusion.neurons import NeuronBundle
from mlp_fusion.reducing.chosen import ChosenFFNs
from mlp_fusion.running.batches import Batch, has_other_inputs, token_mask
from mlp_fusion.running.drawing import random_batch, random_text, text_refusal
from mlp_fusion.running.excerpts import excerpts
from mlp_fusion.running.taps import Activations, capture_activations, stream_activations
from mlp_fusion.settings import FuseSettings

#: Token positions that errors are measured on; the kernels need this many squared numbers.
SAMPLE_ROWS = 512


@dataclass(frozen=True, eq=False)
class Learnt:
    """What a run over the text has shown.

    Attributes:
        batches: the calibration text; None without.
        positions: how many of its positions count, at the first FFN where they are no tokens.
        statistics: per FFN, or None without text and where it is gathered layer by layer.
        sensitivities: per FFN; None of experts, and where nothing asks for them.
        activations: per FFN, the rows that errors are measured on.
        sample: what those are, in words.
        seconds: of gathering statistics and sensitivities; None where there was nothing to gather beforehand.
        synthetic: what stands in for text, in words; None where there is text.
    """

    batches: list[dict[str, Tensor]] | None
    positions: int
    statistics: list[FFNStatistics] | None
    sensitivities: list[OutputSensitivity | None]
    activations: list[Activations]
    sample: str
    seconds: float | None
    synthetic: str | None = None

    def record(self) -> CalibrationRecord | None:
        """For the report."""
        if self.batches is None:
            return None
        return CalibrationRecord(self.positions, self.seconds, self.synthetic)

    def complete(self) -> list[FFNStatistics] | None:
        """The statistics with the sensitivities."""
        if self.statistics is None:
            return None
        pairs = zip(self.statistics, self.sensitivities, strict=True)
        return [with_sensitivity(*pair) for pair in pairs]


def with_sensitivity(statistics: FFNStatistics, found: OutputSensitivity | None) -> FFNStatistics:
    """The statistics with the factor of the sensitivity."""
    return dataclasses.replace(statistics, sensitivity=None if found is None else found.factor)


def learn(
    ffns: ChosenFFNs,
    settings: FuseSettings,
    calibration: Any,
    sample: Batch | Iterable[Batch] | None,
    *,
    synthetic: str | None = None,
    may_skip: bool = False,
) -> Learnt:
    """Run the model over the text.

    Args:
        ffns: the FFNs.
        settings: resolved.
        calibration: batches, or None.
        sample: batches that errors are measured on; None for the calibration text, or else random inputs.
        synthetic: what the batches are that stand in for text, in words.
        may_skip: do without sensitivities, with a warning, where the model does not allow them.

    Raises:
        InputError: the text cannot be used.
    """
    model, architecture, sites, seed = ffns.model, ffns.architecture, ffns.sites, settings.seed
    batches = None if calibration is None else take_calibration(model, calibration)
    started = time.perf_counter()
    statistics = None
    if batches is not None and not settings.sequential:
        statistics = collect(model, architecture, sites, batches, seed=seed, rows=settings.calibration_rows)
    sensitivities: list[OutputSensitivity | None] = [None] * len(sites)
    if batches is not None and settings.weighs_outputs:
        # Experts' outputs are weighed by a router: their errors count alike.
        dense = [number for number, site in enumerate(sites) if not site.is_expert]
        chosen = [sites[n] for n in dense]
        found: list[OutputSensitivity] = []
        try:
            found = output_sensitivities(model, architecture, chosen, batches, seed=seed) if dense else []
        except SkippableError as error:
            if not may_skip:
                raise
            dense = []
            warn_unweighed(error)
        for number, sensitivity in zip(dense, found, strict=True):
            sensitivities[number] = sensitivity
    seconds = time.perf_counter() - started if statistics is not None else None
    activations, described = _measured_on(ffns, settings, sample, batches, statistics)
    count = _positions(ffns, batches, statistics)
    if batches is not None and settings.refit:
        warn_of_few(count, [bundle.w_in for bundle in ffns.originals], settings.calibration_rows)
    return Learnt(batches, count, statistics, sensitivities, activations, described, seconds, synthetic)


def _measured_on(
    ffns: ChosenFFNs,
    settings: FuseSettings,
    sample: Batch | Iterable[Batch] | None,
    batches: Sequence[Batch] | None,
    statistics: Sequence[FFNStatistics] | None,
) -> tuple[list[Activations], str]:
    """Per FFN, the rows that errors are measured on; and what those are, in words."""
    model, architecture, sites, seed = ffns.model, ffns.architecture, ffns.sites, settings.seed
    if settings.unmeasured:
        nothing = [_nothing(site, bundle) for site, bundle in zip(sites, ffns.originals, strict=True)]
        return nothing, "nothing, as the model was not run"
    fitted = "the calibration text, which was fitted to"
    if settings.synthetic is not None:
        fitted = "synthetic inputs, which were fitted to"
    if sample is None and statistics is not None:
        return [sampled_rows(known, seed) for known in statistics], fitted
    shown, described = sample, "the given sample"
    if shown is None and batches is not None:
        shown, described = list(excerpts(model, batches, 4 * SAMPLE_ROWS)), fitted
    if shown is None:
        try:
            shown = random_batch(model, seed=seed)
        except InputError:
            if text_refusal(model, architecture, sites) is not None:
                raise
            shown = random_text(model, seed=seed)
        described = f"random {'inputs' if has_other_inputs(shown) else 'token ids'}"
    return capture_activations(model, architecture, sites, shown, rows=SAMPLE_ROWS, seed=seed), described


def _nothing(site: FFNSite, bundle: NeuronBundle) -> Activations:
    """No row of an FFN."""
    like = site.module.get_parameter(site.kind.parameters[0])
    return Activations(like.new_zeros(0, bundle.w_in.shape[2]), like.new_zeros(0, bundle.w_out.shape[2]))


def _positions(ffns: ChosenFFNs, batches: Sequence[Batch] | None, statistics: Sequence[FFNStatistics] | None) -> int:
    """How many positions of the batches count: their tokens, or else what the first FFN sees."""
    if batches is None or all("input_ids" in batch for batch in batches):
        return sum(int(token_mask(batch).sum()) for batch in batches or ())
    if statistics is not None:
        return statistics[0].tokens
    seen: list[int] = []
    stream_activations(
        ffns.model, ffns.architecture, ffns.sites[:1], batches, lambda _n, mask, _taps: seen.append(int(mask.sum()))
    )
    return sum(seen)


def sampled_rows(statistics: FFNStatistics, seed: int) -> Activations:
    """Rows to measure errors on from those that calibration has kept: the model need not run again."""
    order = torch.randperm(len(statistics.x), generator=torch.Generator().manual_seed(seed))
    chosen = order[:SAMPLE_ROWS].to(statistics.x.device)
    return Activations(statistics.x[chosen], statistics.y[chosen])
