"""Neurons merged into those that stand for them best, by what the model loses.

The neuron whose loss costs the model least goes: what it did would be taken over by the others, in the shares that a
least squares finds, and the next one is chosen with that in mind. So far that is optimal brain surgery on whole neurons
(`obs`). What decides here is not the squared error of the FFN's outputs but what an error does to the model's
predictions, `|e L|^2` with the sensitivity L of :mod:`mlp_fusion.calibration.sensitivity`, and rows of massive outputs
count as others do (:meth:`FFNStatistics.row_weights`). Neurons go a few at a time, one after the other among those that
are cheapest at the block's beginning: of two that say the same, one stays.

Source: Optimal Brain Surgeon (Hassibi & Stork 1993). Gradients under labels that the model draws are K-FAC's (Martens &
Grosse 2015), and prune neurons by masks alone in Kwon et al. (NeurIPS 2022, arXiv 2204.09656); both together, for whole
neurons with all their output weights, are this project's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlp_fusion.calibration.statistics import FFNStatistics
from mlp_fusion.methods import Reduction
from mlp_fusion.methods.obs import LeastSquares, eliminate, least_squares
from mlp_fusion.methods.prune import keep_neurons
from mlp_fusion.neurons import NeuronBundle

#: Rows that the choice is made on.
MERGING_ROWS = 8192
#: As :data:`mlp_fusion.methods.obs.DAMPING`, of this method.
_DAMPING = 3e-2
#: Neurons that go together, at least.
BLOCK = 8


def merge(
    bundle: NeuronBundle, width: int, *, seed: int, statistics: Sequence[FFNStatistics] | None = None
) -> Reduction:
    """Keep the `width` neurons that the others are best merged into, as they are; no scale.

    The merging itself is the refit's, which follows where it is not left out, and whose ridge is chosen on rows that
    are held out: the output weights of the choice, fitted without, generalise worse (on SmolLM2 by two percent of
    perplexity for ten of its layers). Those rows are not looked at here.

    Memory: about `30 N^2` bytes for N neurons, one FFN at a time. Time, with R rows: `2 R N (N + d + d_out)`
    operations, and `4 N^2 (N - width)` in float64.

    Raises:
        InputError: activations whose products leave the range of their dtype.
    """
    assert statistics is not None
    reduced = []
    for n, s in enumerate(statistics):
        original = bundle.select(n)
        kept = eliminate(merging_problem(original, s, seed=seed), width, most=BLOCK)
        reduced.append(keep_neurons(original, kept.unsqueeze(0)))
    return Reduction.plain(NeuronBundle.stack(reduced))


def merging_problem(
    original: NeuronBundle, statistics: FFNStatistics, *, seed: int, damping: float = _DAMPING
) -> LeastSquares:
    """What the model loses by the output weights of an FFN (B = 1), on the rows that are not held out."""
    rows = _fitted_rows(statistics, seed)
    problem = least_squares(original, statistics, damping=damping, rows=rows, weights=statistics.row_weights())
    return problem if statistics.sensitivity is None else problem.seen_through(statistics.sensitivity)


def _fitted_rows(statistics: FFNStatistics, seed: int) -> Tensor:
    """Up to `MERGING_ROWS` rows that are not held out, in order; all there are where all are held out."""
    held_out = statistics.held_out
    rows = (~held_out if not bool(held_out.all()) else held_out).nonzero().squeeze(1)
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:MERGING_ROWS].sort().values
    return rows[drawn.to(rows.device)]
