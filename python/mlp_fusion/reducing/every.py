"""Widths, and methods and corrections over all chosen FFNs of a model, side by side or one after the other."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from mlp_fusion.calibration import FFNStatistics, OutputSensitivity, collect
from mlp_fusion.calibration.sensitivity import SENSED_TOKENS
from mlp_fusion.families import FFNSite
from mlp_fusion.neurons import NeuronBundle
from mlp_fusion.reducing.chosen import ChosenFFNs
from mlp_fusion.reducing.curves import elimination_curve, hidden_state_changes, stacks_of, tried_curves
from mlp_fusion.reducing.learning import Learnt, with_sensitivity
from mlp_fusion.reducing.pipeline import Progress, Recipe, ReducedFFN, progress_units, reduce_ffns, with_enough_tokens
from mlp_fusion.reducing.sequential import reduce_sequentially
from mlp_fusion.reducing.widths import Choice, allocate_widths
from mlp_fusion.running.batches import Batch
from mlp_fusion.running.excerpts import excerpts
from mlp_fusion.settings import FuseSettings


def reduce_chosen(
    ffns: ChosenFFNs, settings: FuseSettings, widths: Sequence[int], learnt: Learnt, progress: Progress | None = None
) -> list[ReducedFFN]:
    """Reduce every chosen FFN; the model is not changed.

    Args:
        ffns: the FFNs.
        settings: resolved.
        widths: of each; none where a budget decides.
        learnt: what is known of them.
        progress: as in :func:`mlp_fusion.fuse`.
    """
    recipe = Recipe.of(settings)
    if settings.budget is not None and learnt.batches is not None:
        curves = _curves(ffns, settings, learnt, learnt.batches, progress)
        widths = allocate_widths(curves, stacks_of(ffns.sites), settings.budget)
    if learnt.batches is None or not settings.sequential:
        known = learnt.complete()
        if known is not None:
            known = [with_enough_tokens(*pair) for pair in zip(ffns.sites, known, strict=True)]
        return reduce_ffns(recipe, ffns.originals, widths, known, progress)
    reduce = functools.partial(_reduce_one, recipe, ffns.sites, ffns.originals, widths, learnt.sensitivities, progress)
    return reduce_sequentially(
        ffns.model, ffns.architecture, ffns.sites, learnt.batches, reduce, seed=settings.seed,
        rows=settings.calibration_rows,
    )  # fmt: skip


def _curves(
    ffns: ChosenFFNs, settings: FuseSettings, learnt: Learnt, batches: Sequence[Batch], progress: Progress | None
) -> list[list[Choice]]:
    """What the model loses by each FFN, or stack of experts, by its width."""
    gather = functools.partial(collect, ffns.model, ffns.architecture, ffns.sites, seed=settings.seed)
    # In a sequential run they are needed for this alone, and gone before it begins.
    statistics = learnt.statistics or gather(batches, rows=settings.calibration_rows)
    found = [sensitivity for sensitivity in learnt.sensitivities if sensitivity is not None]
    if len(found) < len(ffns.sites):
        effects = functools.partial(hidden_state_changes, ffns.model, ffns.architecture, ffns.sites, batches)
        stacks = stacks_of(ffns.sites)
        return tried_curves(Recipe.of(settings), ffns.originals, statistics, effects, stacks, progress)
    rows = max(len(each.sizes) for each in found)  # all there are
    judged = gather(list(excerpts(ffns.model, batches, SENSED_TOKENS)), rows=rows)
    curves = []
    for each in zip(ffns.originals, statistics, judged, found, strict=True):
        curves.append(elimination_curve(*each, seed=settings.seed))
        if progress is not None:
            progress(len(curves), len(ffns.sites))
    return curves


def _reduce_one(
    recipe: Recipe,
    sites: Sequence[FFNSite],
    originals: Sequence[NeuronBundle],
    widths: Sequence[int],
    sensitivities: Sequence[OutputSensitivity | None],
    progress: Progress | None,
    number: int,
    statistics: FFNStatistics,
) -> ReducedFFN:
    """One of the FFNs, whose statistics are only now known."""

    def report(done: int, _total: int) -> None:
        if progress is not None:
            units = progress_units(recipe)
            progress(units * number + done, units * len(originals))

    known = with_sensitivity(with_enough_tokens(sites[number], statistics), sensitivities[number])
    return reduce_ffns(recipe, [originals[number]], [widths[number]], [known], report)[0]
