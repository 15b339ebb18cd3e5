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

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mlp_fusion.calibration.statistics import FFNStatistics
from mlp_fusion.methods import Reduction
from mlp_fusion.methods.obs import LeastSquares, least_squares
from mlp_fusion.methods.prune import keep_neurons
from mlp_fusion.neurons import NeuronBundle

#: Rows that the choice is made on.
MERGING_ROWS = 8192
#: As :data:`mlp_fusion.methods.obs.DAMPING`.
_DAMPING = 3e-2
#: Neurons that go together: this many, and a share of those that are left in wide FFNs.
_BLOCK, _BLOCK_SHARE = 8, 128
#: Times as many neurons are looked at.
_CANDIDATES = 4


def merge(
    bundle: NeuronBundle, width: int, *, seed: int, statistics: Sequence[FFNStatistics] | None = None
) -> Reduction:
    """Keep the `width` neurons that the others are best merged into, as they are; no scale.

    The merging itself is the refit's, which follows where it is not left out, and whose ridge is chosen on rows that
    are held out: the output weights of the choice, fitted without, generalise worse (on SmolLM2 by two percent of
    perplexity for ten of its layers). Those rows are not looked at here.

    Memory: `24 N^2` bytes for N neurons, one FFN at a time. Time, with R rows: `2 R N (N + d + d_out)` operations, and
    `4 N^2 (N - width)` in float64.

    Raises:
        InputError: activations whose products leave the range of their dtype.
    """
    assert statistics is not None
    reduced = []
    for n, s in enumerate(statistics):
        original = bundle.select(n)
        rows = _fitted_rows(s, seed)
        problem = least_squares(original, s, damping=_DAMPING, rows=rows, weights=s.row_weights())
        seen = problem if s.sensitivity is None else problem.seen_through(s.sensitivity)
        reduced.append(keep_neurons(original, remaining(seen, width).unsqueeze(0)))
    return Reduction.plain(NeuronBundle.stack(reduced))


def _fitted_rows(statistics: FFNStatistics, seed: int) -> Tensor:
    """Up to `MERGING_ROWS` rows that are not held out, in order; all there are where all are held out."""
    held_out = statistics.held_out
    rows = (~held_out if not bool(held_out.all()) else held_out).nonzero().squeeze(1)
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:MERGING_ROWS].sort().values
    return rows[drawn.to(rows.device)]


def remaining(problem: LeastSquares, width: int) -> Tensor:
    """`(width,)` numbers of the neurons that are left, in order, when the cheapest few have gone again and again.

    Each block is a step of a Cholesky factorisation of the inverse, pivoted by what neurons cost: no matrix is changed
    on the way. Of equally cheap neurons the first go; neurons that never fire are free.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(problem.normal))
    weights, left = inverse @ problem.target, inverse.diagonal().clone()
    factor = inverse.new_zeros(len(inverse) - width, len(inverse))
    gone = torch.zeros(len(inverse), dtype=torch.bool, device=inverse.device)
    done = 0
    while done < len(factor):
        block = min(max(_BLOCK, (len(inverse) - done) // _BLOCK_SHARE), len(factor) - done)
        cost = torch.where(gone, math.inf, weights.square().sum(dim=1) / left)
        candidates = cost.sort(stable=True).indices[: min(_CANDIDATES * block, len(inverse) - done)].sort().values
        among = inverse[candidates][:, candidates] - factor[:done, candidates].T @ factor[:done, candidates]
        chosen = candidates[_cheapest(among, weights[candidates], block)]
        columns = inverse[chosen] - factor[:done, chosen].T @ factor[:done]
        root = torch.linalg.cholesky(columns[:, chosen])
        columns = torch.linalg.solve_triangular(root, columns, upper=False)
        factor[done : done + block] = columns
        weights -= columns.T @ torch.linalg.solve_triangular(root, weights[chosen], upper=False)
        left = left - columns.square().sum(dim=0)
        gone[chosen] = True
        done += block
    return (~gone).nonzero().squeeze(1)


def _cheapest(inverse: Tensor, weights: Tensor, count: int) -> Tensor:
    """`(count,)` rows in the order in which neurons go, each after the others have taken over what the last one did."""
    inverse, weights = inverse.clone(), weights.clone()
    chosen: list[int] = []
    for _ in range(count):
        cost = weights.square().sum(dim=1) / inverse.diagonal()
        cost[chosen] = math.inf
        k = int(cost.argmin())
        column = inverse[:, k] / inverse[k, k].sqrt()
        weights -= torch.outer(column, weights[k] / column[k])
        inverse -= torch.outer(column, column)
        chosen.append(k)
    return torch.tensor(chosen, dtype=torch.int64, device=inverse.device)
