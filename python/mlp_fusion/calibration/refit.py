"""Least-squares refit of the output weights and bias of a reduced feed-forward layer (FFN).

With H the reduced FFN's hidden activations, scale included, and Y the original's outputs on calibration rows,

    min over V, b of  |Y - H V - 1 b^T|_F^2 + r T |D (V - V0)|_F^2

in closed form, where V0 are the present output weights, D the standard deviations of the columns of H (so that the
ridge r has no unit) and T the number of rows. The scale and the input weights stay as they are: whatever the
parameterization, the refitted FFN has one.

Source: ridge regression (Hoerl & Kennard 1970), shrunk towards the weights at hand rather than towards 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlp_fusion.calibration.outer import multiply_outer, subtract_outer
from mlp_fusion.calibration.statistics import FFNStatistics
from mlp_fusion.neurons import NeuronBundle

#: Candidates for the ridge, from next to nothing to next to everything.
RIDGES = (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 1.0)
#: Where the search for a ridge begins.
_FIRST_RIDGE = 3e-2
#: Rows whose activations are held at a time.
_CHUNK = 2048
#: Rows that the activations' means are guessed from.
_SHIFT_ROWS = 256


@dataclass(frozen=True, eq=False)
class Refit:
    """A refitted FFN.

    Attributes:
        bundle: the reduced FFN with new `w_out` and, where it has one, `b_out`.
        ridge: the regularisation chosen, or None where there was nothing to choose it on.
        held_out_error: relative Frobenius error on the held-out rows of a fit to the others; None without a ridge.
    """

    bundle: NeuronBundle
    ridge: float | None
    held_out_error: float | None


@dataclass(eq=False)
class _Moments:
    """Sums over rows of products of `D = [H - shift, 1]` with itself and with the residual R of the present weights.

    Attributes:
        gram, cross: `D^T D` and `D^T R`, float64.
        residual, target: `|R|_F^2` and `|Y|_F^2`, float64.
        rows: how many.
    """

    gram: Tensor
    cross: Tensor
    residual: Tensor
    target: Tensor
    rows: int

    def add(self, other: _Moments) -> None:
        self.gram += other.gram
        self.cross += other.cross
        self.residual += other.residual
        self.target += other.target
        self.rows += other.rows


def refit(reduced: NeuronBundle, statistics: FFNStatistics) -> Refit:
    """Refit `w_out` and `b_out` of `reduced` to the outputs of the original FFN on the calibration rows.

    The ridge is one of `RIDGES` whose neighbours do not do better on held-out sequences; the final weights are fitted
    to all rows with it. An FFN without output bias gets none. Silent neurons (of scale 0) keep their weights.

    Args:
        reduced: the reduced FFN, B = 1, in any parameterization; the result is canonical (`scale_exponent` 0).
        statistics: of the original.

    Memory: a copy of the rows, 2,048 rows of activations, and about `44 K^2 + 32 K d_out` bytes for K neurons. Time:
    `2 R K (d + K + 2 d_out)` operations in the working precision, and a Cholesky factorisation of a K x K matrix per
    candidate tried, three at least.

    Raises:
        ValueError: the bundle holds more than one FFN.
    """
    if reduced.batch != 1:
        raise ValueError(f"refit takes one FFN, the bundle has {reduced.batch}: select one")
    reduced = reduced.canonical()
    x, y = (rows.to(reduced.w_in.dtype) for rows in (statistics.x, statistics.y))
    held_out = statistics.held_out
    shift = _shift(reduced, x)
    fitted, tested = (_moments(reduced, x[rows], y[rows], shift) for rows in (~held_out, held_out))
    if fitted.rows == 0 or tested.rows == 0:
        fitted.add(tested)
        return Refit(_changed(reduced, _solve(fitted, reduced, RIDGES[-1]), shift), None, None)
    # Activations and their products are rounded in the working precision: directions smaller than that are noise.
    noise = reduced.width * torch.finfo(reduced.w_out.dtype).eps
    ridges = [ridge for ridge in RIDGES if ridge >= min(noise, RIDGES[-1])]
    ridge, loss = _choose(ridges, fitted, tested, reduced)
    square, norm = max(0.0, float(tested.residual) + loss), float(tested.target)
    error = (square / norm) ** 0.5 if norm > 0.0 else (0.0 if square == 0.0 else math.inf)
    fitted.add(tested)
    del tested
    return Refit(_changed(reduced, _solve(fitted, reduced, ridge), shift), ridge, error)


def _choose(ridges: Sequence[float], fitted: _Moments, tested: _Moments, reduced: NeuronBundle) -> tuple[float, float]:
    """The ridge with the smallest error on held-out rows, and that error's square less `|R|_F^2`.

    Downhill from `_FIRST_RIDGE` to the next minimum: the error falls and rises with the ridge, and most of the time is
    in solving.
    """
    found: dict[int, float] = {}

    def loss(index: int) -> float:
        if not 0 <= index < len(ridges):
            return math.inf
        if index not in found:
            c = _solve(fitted, reduced, ridges[index])
            # |R - D C|^2 up to |R|^2, which is the same for all.
            found[index] = float(((tested.gram @ c - 2.0 * tested.cross) * c).sum())
        return found[index]

    best = min(range(len(ridges)), key=lambda n: abs(math.log(ridges[n] / _FIRST_RIDGE)))
    for direction in (-1, 1):
        while loss(best + direction) < loss(best):
            best += direction
    return ridges[best], loss(best)


def _shift(reduced: NeuronBundle, x: Tensor) -> Tensor:
    """`(K,)` about the mean of the activations: without it, products of large means would drown their variances.

    An FFN without output bias must not have its activations centred.
    """
    if reduced.b_out is None or len(x) == 0:
        return reduced.w_out.new_zeros(reduced.width)
    return reduced.hidden(x[:: max(1, len(x) // _SHIFT_ROWS)])[0].mean(dim=0)


def _moments(reduced: NeuronBundle, x: Tensor, y: Tensor, shift: Tensor) -> _Moments:
    K, d_out = reduced.w_out.shape[1:]
    gram, cross, residuals, targets = (
        torch.zeros(shape, dtype=torch.float64, device=x.device) for shape in ((K + 1, K + 1), (K + 1, d_out), (), ())
    )
    for rows, outputs in zip(x.split(_CHUNK), y.split(_CHUNK), strict=True):
        hidden = reduced.hidden(rows)[0]
        residual = torch.addmm(outputs, hidden, reduced.w_out[0], alpha=-1.0)
        if reduced.b_out is not None:
            residual -= reduced.b_out[0]
        design = torch.nn.functional.pad(hidden - shift, (0, 1), value=1.0)
        # Blocks of a few thousand rows in the working precision, their sum in float64.
        gram += design.T @ design
        cross += design.T @ residual
        residuals += torch.linalg.vector_norm(residual, dtype=torch.float64).square()
        targets += torch.linalg.vector_norm(outputs, dtype=torch.float64).square()
    return _Moments(gram, cross, residuals, targets, len(x))


def _solve(moments: _Moments, reduced: NeuronBundle, ridge: float) -> Tensor:
    """`(K + 1, d_out)` float64: the changes of the output weights and, in the last row, of the shifted bias."""
    total = moments.gram[-1, -1].clamp(min=1.0)
    mean, mean_residual = moments.gram[-1, :-1] / total, moments.cross[-1] / total
    normal, cross = moments.gram[:-1, :-1].clone(), moments.cross[:-1]
    if reduced.b_out is not None:
        # An unpenalised bias is the same as centred columns.
        sized = total.sqrt() * mean  # twice the same vector: the matrix stays symmetric
        subtract_outer(normal, sized, sized)
        cross = cross - total * torch.outer(mean, mean_residual)
    deviation = (normal.diagonal() / total).clamp(min=0.0).sqrt()
    alive = deviation > torch.finfo(reduced.w_out.dtype).eps * deviation.max()
    inverse = torch.where(alive, 1.0 / deviation.where(alive, torch.ones_like(deviation)), 0.0)
    multiply_outer(normal, inverse, inverse)
    normal /= total
    # The diagonal of a silent neuron is the ridge alone: its change comes out as 0.
    normal.diagonal().add_(ridge)
    factor = _factor(normal, ridge)
    del normal
    change = torch.cholesky_solve(cross * inverse.unsqueeze(1) / total, factor) * inverse.unsqueeze(1)
    bias = mean_residual - mean @ change if reduced.b_out is not None else torch.zeros_like(mean_residual)
    return torch.cat([change, bias.unsqueeze(0)])


def _factor(normal: Tensor, ridge: float) -> Tensor:
    """Cholesky's factor of a matrix with a ridge on its diagonal of ones; of ten times that, and so on, if it has none.

    The products of activations are rounded: where few directions hold all of them, a small ridge may be less than that.

    Raises:
        LinAlgError: no ridge helps, as with NaN.
    """
    factor, failed = torch.linalg.cholesky_ex(normal)
    while bool(failed) and ridge < len(normal):
        normal.diagonal().add_(9.0 * ridge)
        ridge *= 10.0
        factor, failed = torch.linalg.cholesky_ex(normal)
    return torch.linalg.cholesky(normal) if bool(failed) else factor


def _changed(reduced: NeuronBundle, change: Tensor, shift: Tensor) -> NeuronBundle:
    w_out = (reduced.w_out[0].double() + change[:-1]).to(reduced.w_out.dtype).unsqueeze(0)
    b_out = reduced.b_out
    if b_out is not None:
        b_out = (b_out[0].double() + change[-1] - shift.double() @ change[:-1]).to(b_out.dtype).unsqueeze(0)
    return dataclasses.replace(reduced, w_out=w_out, b_out=b_out)
