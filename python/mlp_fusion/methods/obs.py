"""Optimal brain surgery on whole neurons: drop the one whose loss costs least, mend the others, and again.

The outputs are linear in the output weights V, so that the squared error on calibration rows is a quadratic function of
them. With A its matrix and V at its minimum, dropping neuron k raises it by |V_k|^2 / [A^-1]_kk when all other weights
are fitted anew, which takes V to `V - A^-1[:, k] V_k / [A^-1]_kk`. Greedy: the cheapest neuron goes, until `width` are
left. Each step is exact; SlimGPT drops several at a time where there are too many.

`LeastSquares` is that quadratic function; `fasp` and `osscar` are other ways to make it small.

Source: SlimGPT (arXiv 2412.18110), after Optimal Brain Surgeon (Hassibi & Stork 1993). The steps are those of a partial
Cholesky factorisation of A^-1, pivoted by what they cost: no matrix is changed on the way.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlp_fusion.calibration.outer import multiply_outer, subtract_outer
from mlp_fusion.calibration.statistics import FFNStatistics
from mlp_fusion.errors import InputError
from mlp_fusion.methods import Reduction
from mlp_fusion.methods.prune import keep_neurons
from mlp_fusion.neurons import NeuronBundle

#: Weight of a neuron's own mean square that holds its output weights where they are. SparseGPT and its kin dampen by
#: this share of the mean over all neurons, in which those that fire for one massive token drown the others.
DAMPING = 1e-2
#: Neurons that go together where several do, as a share of those that are left, and times as many are looked at.
_BLOCK_SHARE, _CANDIDATES = 128, 4
#: Rows whose activations are held at a time, and rows that their means are guessed from.
_CHUNK, _SHIFT_ROWS = 2048, 256


def obs(bundle: NeuronBundle, width: int, *, seed: int, statistics: Sequence[FFNStatistics] | None = None) -> Reduction:
    """Keep the `width` neurons that :func:`eliminate` leaves, with the output weights that fit best; no scale.

    Memory: about `28 N^2` bytes for N neurons, one FFN at a time, LAPACK's copies among them. Time, with R rows: `2 R N
    (N + d + d_out)` operations, and `2 (N - width) N (N - width + d_out)` in float64.

    Raises:
        InputError: activations whose products leave the range of their dtype.
    """
    assert statistics is not None
    reduced = []
    for n, s in enumerate(statistics):
        original = bundle.select(n)
        problem = least_squares(original, s)
        reduced.append(problem.reduced(original, eliminate(problem, width)))
    return Reduction.plain(NeuronBundle.stack(reduced))


@dataclass(frozen=True, eq=False)
class LeastSquares:
    """The mean squared error of an FFN's outputs, as a function of its output weights V, plus what holds these.

        E(V) = mean over rows of |y - b - V^T h|^2 + damping * sum over k of s_k^2 |V_k - V0_k|^2

    Neurons are measured in root mean squares s of their activations h, so that E is a quadratic function of s V without
    units. An FFN with output bias has the bias that fits best: h and y are then centred, and s are deviations.

    Attributes:
        normal: `(N, N)` float64, the matrix of E, of positive eigenvalues.
        target: `(N, d_out)` float64: `normal @ (s V)` at the minimum.
        square: E of silent neurons (V = 0).
        size: `(N,)` s; 0 of a neuron that never fires, whose weights have no part in E.
        mean, mean_target: `(N,)` and `(d_out,)` means over rows of h, and of y.
    """

    normal: Tensor
    target: Tensor
    square: float
    size: Tensor
    mean: Tensor
    mean_target: Tensor

    def seen_through(self, metric: Tensor) -> LeastSquares:
        """The same with errors e of the outputs measured as `|e L|^2`, for the `(d_out, d_out)` L.

        `square` is of E as it was: only differences of E have the new meaning.
        """
        return dataclasses.replace(self, target=self.target @ metric.to(self.target))

    def solution(self, kept: Tensor) -> Tensor:
        """`(K, d_out)` s V at the minimum of E where only the neurons `kept (K,)` are there."""
        factor = torch.linalg.cholesky(self.normal[kept][:, kept])
        return torch.cholesky_solve(self.target[kept], factor)

    def reduced(self, original: NeuronBundle, kept: Tensor) -> NeuronBundle:
        """The neurons `kept (K,)` of `original`, with the output weights, and the bias, that make E smallest.

        Those of neurons that never fire stay as they are.
        """
        found, size = keep_neurons(original, kept.unsqueeze(0)), self.size[kept].unsqueeze(1)
        fires = size > 0
        weights = self.solution(kept) / size.where(fires, torch.ones_like(size))
        w_out = torch.where(fires, weights, found.w_out[0].double()).to(found.w_out.dtype)
        changes: dict[str, Any] = {"w_out": w_out.unsqueeze(0)}
        if found.b_out is not None:
            bias = self.mean_target - self.mean[kept] @ w_out.double()
            changes["b_out"] = bias.to(found.b_out.dtype).unsqueeze(0)
        return dataclasses.replace(found, **changes)


def least_squares(
    bundle: NeuronBundle,
    statistics: FFNStatistics,
    *,
    damping: float = DAMPING,
    anchored: bool = True,
    rows: Tensor | None = None,
    weights: Tensor | None = None,
) -> LeastSquares:
    """The error of `bundle` (B = 1) on the calibration rows; the outputs in `statistics` are what is to come out.

    Args:
        bundle: one FFN.
        statistics: of it.
        damping: see :class:`LeastSquares`.
        anchored: whether V0 are the output weights at hand; else 0.
        rows: numbers of the rows that count; None for all.
        weights: `(R,)` of all rows: each row's error is multiplied by its own. None: all count alike.

    Raises:
        InputError: activations whose products leave the range of their dtype.
    """
    bundle = bundle.canonical()
    chosen = slice(None) if rows is None else rows
    x, y = (each[chosen].to(bundle.w_in.dtype) for each in (statistics.x, statistics.y))
    # A weighed error is the error of weighed rows; means are weighed by the squares.
    by = x.new_ones(len(x), 1) if weights is None else weights[chosen].to(x.dtype).unsqueeze(1)
    T, centred = float(by.double().square().sum()), bundle.b_out is not None
    shift = x.new_zeros(bundle.width)
    if centred:  # about their mean: products of large means would drown variances
        shift = bundle.hidden(x[:: max(1, len(x) // _SHIFT_ROWS)])[0].mean(dim=0)
    gram = torch.zeros(bundle.width, bundle.width, dtype=torch.float64, device=x.device)
    cross = torch.zeros(bundle.width, y.shape[1], dtype=torch.float64, device=x.device)
    total = torch.zeros(bundle.width, dtype=torch.float64, device=x.device)
    for inputs, outputs, each in zip(x.split(_CHUNK), y.split(_CHUNK), by.split(_CHUNK), strict=True):
        hidden = (bundle.hidden(inputs)[0] - shift) * each
        gram += hidden.T @ hidden
        cross += hidden.T @ (outputs * each)
        total += (hidden * each).sum(dim=0)
    gram /= T
    cross /= T
    mean = total / T
    mean_target = (y * by.square()).sum(dim=0, dtype=torch.float64) / T
    square = float((y * by).double().square().sum() / T)
    if centred:
        subtract_outer(gram, mean, mean)
        subtract_outer(cross, mean, mean_target)
        square -= float(mean_target.square().sum())
    if not bool(gram.isfinite().all() & cross.isfinite().all()) or not math.isfinite(square):
        raise InputError("activations are too large for least squares: use a method that does not fit, such as prune")
    size = gram.diagonal().clamp(min=0.0).sqrt()
    size = torch.where(size > torch.finfo(x.dtype).eps * size.max(), size, 0.0)
    unit = torch.where(size > 0, 1.0 / size.where(size > 0, torch.ones_like(size)), 0.0)
    multiply_outer(gram, unit, unit)
    gram.diagonal().add_(damping)
    target = cross * unit.unsqueeze(1)
    if anchored:
        anchor = bundle.w_out[0].double() * size.unsqueeze(1)
        target = target + damping * anchor
        square += damping * float(anchor.square().sum())
    return LeastSquares(gram, target, square, size, mean + shift, mean_target)


def eliminate(problem: LeastSquares, width: int, *, most: int = 1) -> Tensor:
    """`(width,)` numbers of the neurons that are left, in order, when the cheapest has gone again and again.

    As the last of :func:`eliminations`.
    """
    (left,) = (left for left, _ in eliminations(problem, [width], most=most))
    return left.nonzero().squeeze(1)


def eliminations(problem: LeastSquares, widths: Sequence[int], *, most: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """What is left on the way, when the cheapest neuron goes again and again.

    Each block is a step of a Cholesky factorisation of the inverse, pivoted by what neurons cost. Of equally cheap
    neurons the first goes; neurons that never fire are free.

    Args:
        problem: the error of subsets.
        widths: how many are left at each stop, in descending order.
        most: neurons that go before the costs of all others are known again: so many, and more in wide FFNs. They go
            one after the other among the few that are cheapest at the block's beginning, each when the others have
            taken over what the last one did: of two that say the same, one stays. With 1 every step is exact.

    Yields:
        For each of `widths`, `(N,)` bool which neurons are left, and `(N, d_out)` float64 s V at the minimum of E over
        these; 0 of the others.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(problem.normal))
    weights, rest = inverse @ problem.target, inverse.diagonal().clone()
    factor = inverse.new_zeros(len(inverse) - widths[-1], len(inverse))
    left = torch.ones(len(inverse), dtype=torch.bool, device=inverse.device)
    done = 0
    for width in widths:
        stop = len(inverse) - width
        while done < stop:
            block = 1 if most == 1 else min(max(most, (len(inverse) - done) // _BLOCK_SHARE), stop - done)
            cost = torch.where(left, weights.square().sum(dim=1) / rest, math.inf)
            if block == 1:
                chosen = cost.argmin().unsqueeze(0)
            else:
                count = min(_CANDIDATES * block, len(inverse) - done)
                candidates = cost.sort(stable=True).indices[:count].sort().values
                among = inverse[candidates][:, candidates] - factor[:done, candidates].T @ factor[:done, candidates]
                chosen = candidates[_cheapest(among, weights[candidates], block)]
            columns = inverse[chosen] - factor[:done, chosen].T @ factor[:done]
            root = torch.linalg.cholesky(columns[:, chosen])
            columns = torch.linalg.solve_triangular(root, columns, upper=False)
            factor[done : done + block] = columns
            weights -= columns.T @ torch.linalg.solve_triangular(root, weights[chosen], upper=False)
            rest = rest - columns.square().sum(dim=0)
            left[chosen] = False
            done += block
        yield left.clone(), torch.where(left.unsqueeze(1), weights, 0.0)


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
