"""Widths, and methods and corrections over all chosen FFNs of a model, side by side or one after the other."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from torch import Tensor

from mlp_fusion.calibration import FFNStatistics
from mlp_fusion.families import FFNSite
from mlp_fusion.neurons import NeuronBundle
from mlp_fusion.reducing.chosen import ChosenFFNs
from mlp_fusion.reducing.learning import Learnt
from mlp_fusion.reducing.pipeline import Progress, Recipe, ReducedFFN, progress_units, reduce_ffns, with_enough_tokens
from mlp_fusion.reducing.sequential import reduce_sequentially
from mlp_fusion.reducing.widths import allocate_widths, hidden_state_changes, stacks_of
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
    if settings.budget is not None and learnt.statistics is not None and learnt.batches is not None:
        effects = functools.partial(hidden_state_changes, ffns.model, ffns.architecture, ffns.sites, learnt.batches)
        stacks = stacks_of(ffns.sites)
        widths = allocate_widths(recipe, ffns.originals, learnt.statistics, settings.budget, effects, stacks, progress)
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


def _reduce_one(
    recipe: Recipe,
    sites: Sequence[FFNSite],
    originals: Sequence[NeuronBundle],
    widths: Sequence[int],
    sensitivities: Sequence[Tensor | None],
    progress: Progress | None,
    number: int,
    statistics: FFNStatistics,
) -> ReducedFFN:
    """One of the FFNs, whose statistics are only now known."""

    def report(done: int, _total: int) -> None:
        if progress is not None:
            units = progress_units(recipe)
            progress(units * number + done, units * len(originals))

    known = dataclasses.replace(with_enough_tokens(sites[number], statistics), sensitivity=sensitivities[number])
    return reduce_ffns(recipe, [originals[number]], [widths[number]], [known], report)[0]
