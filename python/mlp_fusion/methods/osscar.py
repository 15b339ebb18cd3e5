"""Pruning as a combinatorial problem: local search among subsets of neurons, by swaps.

The error of a subset is that of its best output weights (:class:`mlp_fusion.methods.obs.LeastSquares`). From the subset
that `obs` leaves, the swap of a kept neuron against a dropped one that lowers the error most is made, until none lowers
it noticeably. One matrix knows the error of every swap: with S the kept and R the dropped neurons it holds
[A_SS]^-1, [A_SS]^-1 A_SR and the Schur complement of A_SS, and beside it the weights of S and the residuals of R. A
neuron that enters or leaves is one pivot, `N^2` operations.

Source: OSSCAR (arXiv 2403.12983): the quadratic objective, and local search by updates of low rank. The paper drops
neurons in a few large stages, each with a search among approximate swaps; here each stage drops one, exactly, which is
`obs`, and the search at the end is exact too. The pivots are Goodnight's sweep operator (1979).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlp_fusion.calibration.outer import subtract_outer
from mlp_fusion.calibration.statistics import FFNStatistics
from mlp_fusion.methods import Reduction
from mlp_fusion.methods.obs import LeastSquares, eliminate, least_squares
from mlp_fusion.neurons import NeuronBundle

#: A swap is made if it lowers the error by this share, and at most one for so many neurons that are kept.
_LEAST_GAIN, _NEURONS_PER_SWAP = 1e-6, 8


def osscar(
    bundle: NeuronBundle, width: int, *, seed: int, statistics: Sequence[FFNStatistics] | None = None
) -> Reduction:
    """Keep the `width` neurons that :func:`exchange` ends with, with the output weights that fit best. No scale.

    Memory: about `40 N^2` bytes for N neurons, one FFN at a time. Time: as `obs`, and per swap `2 width (N - width)
    d_out` operations and a few passes over N^2 numbers.

    Raises:
        InputError: activations whose products leave the range of their dtype.
    """
    assert statistics is not None
    reduced = []
    for n, s in enumerate(statistics):
        original = bundle.select(n)
        problem = least_squares(original, s)
        kept = exchange(problem, eliminate(problem, width), -(-width // _NEURONS_PER_SWAP))
        reduced.append(problem.reduced(original, kept))
    return Reduction.plain(NeuronBundle.stack(reduced))


def exchange(problem: LeastSquares, kept: Tensor, swaps: int, least: float = _LEAST_GAIN) -> Tensor:
    """`(K,)` numbers of the neurons, in order, after the best swaps.

    Args:
        problem: the error of subsets.
        kept: `(K,)` numbers to start from.
        swaps: most of them.
        least: share of the error by which a swap must lower it.
    """
    inside = torch.zeros(len(problem.normal), dtype=torch.bool, device=kept.device)
    inside[kept] = True
    table, weights = _tableau(problem, inside)
    for _ in range(swaps):
        mine, others = inside.nonzero().squeeze(1), (~inside).nonzero().squeeze(1)
        if len(others) == 0:
            break
        change = _changes(table, weights, mine, others)
        best = int(change.argmin())
        error = problem.square - float((weights[mine] * problem.target[mine]).sum())
        if not float(change.flatten()[best]) < -least * error:
            break
        leaving, entering = int(mine[best // len(others)]), int(others[best % len(others)])
        _pivot(table, weights, leaving, entering=False)
        _pivot(table, weights, entering, entering=True)
        inside[leaving], inside[entering] = False, True
    return inside.nonzero().squeeze(1)


def _tableau(problem: LeastSquares, inside: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`_pivot` makes of `normal` and `target` when the neurons `inside (N,)` have entered."""
    mine, others = inside.nonzero().squeeze(1), (~inside).nonzero().squeeze(1)
    table, weights = problem.normal.clone(), problem.target.clone()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(table[mine.unsqueeze(1), mine]))
    across = table[mine.unsqueeze(1), others]
    links, weights[mine] = inverse @ across, inverse @ weights[mine]
    weights[others] -= across.T @ weights[mine]
    table[others.unsqueeze(1), others] -= across.T @ links
    table[mine.unsqueeze(1), mine] = -inverse
    table[mine.unsqueeze(1), others] = links
    table[others.unsqueeze(1), mine] = links.T
    return table, weights


def _changes(table: Tensor, weights: Tensor, mine: Tensor, others: Tensor) -> Tensor:
    """`(K, N - K)` what each swap adds to the error: what leaving costs, less what entering then saves."""
    inverse, links, schur = -table[mine, mine], table[mine.unsqueeze(1), others], table[others, others]
    own, residual = weights[mine], weights[others]
    share = links / inverse.unsqueeze(1)
    # The residual of a newcomer r_j once i has left is r_j + share_ij V_i, its remaining variance schur_j + ...
    saved = share.square() * own.square().sum(dim=1, keepdim=True)
    saved += 2.0 * share * (own @ residual.T)
    saved += residual.square().sum(dim=1)
    saved /= schur + share * links
    return (own.square().sum(dim=1) / inverse).unsqueeze(1) - saved


def _pivot(table: Tensor, weights: Tensor, k: int, *, entering: bool) -> None:
    """Let neuron `k` into the subset or out of it, in place.

    Inside, `table (N, N)` is -[A_SS]^-1 and `weights (N, d_out)` are the fitted ones; outside, the Schur complement and
    the residuals; between, [A_SS]^-1 A_SR.
    """
    sign = 1.0 if entering else -1.0
    pivot, row, own = table[k, k].clone(), table[k].clone(), weights[k].clone()
    column = row / pivot
    subtract_outer(table, column, row)
    subtract_outer(weights, column, own)
    table[k] = table[:, k] = sign * column
    table[k, k] = -1.0 / pivot
    weights[k] = sign * own / pivot
