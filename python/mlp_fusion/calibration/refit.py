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
from dataclasses import dataclass

import torch
from torch import Tensor

from mlp_fusion.calibration.statistics import FFNStatistics
from mlp_fusion.measure.errors import relative_error
from mlp_fusion.neurons import NeuronBundle

#: Candidates for the ridge, from next to nothing to next to everything.
RIDGES = (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 1.0)
#: Rows whose activations are held at a time.
_CHUNK = 2048


@dataclass(frozen=True, eq=False)
class Refit:
    """A refitted FFN.

    Attributes:
        bundle: the reduced FFN with new `w_out` and, where it has one, `b_out`.
        ridge: the regularisation chosen, or None where there was nothing to choose it on.
        held_out_error: relative Frobenius error on the held-out rows of the fit to the others, with that ridge.
    """

    bundle: NeuronBundle
    ridge: float | None
    held_out_error: float | None


@dataclass(frozen=True, eq=False)
class _Moments:
    """Sums over rows of products of `[H, 1]` with itself and with the residual of the present weights; float64."""

    gram: Tensor
    cross: Tensor
    rows: int

    def __add__(self, other: _Moments) -> _Moments:
        return _Moments(self.gram + other.gram, self.cross + other.cross, self.rows + other.rows)


def refit(reduced: NeuronBundle, statistics: FFNStatistics) -> Refit:
    """Refit `w_out` and `b_out` of `reduced` to the outputs of the original FFN on the calibration rows.

    The ridge is the one of `RIDGES` with the smallest error on held-out sequences; the final weights are fitted to all
    rows with it. An FFN without output bias gets none. Silent neurons (of scale 0) keep their weights.

    Args:
        reduced: the reduced FFN, B = 1, in any parameterization; the result is canonical (`scale_exponent` 0).
        statistics: of the original.

    Memory: 2,048 rows of activations, and `8 K (3 K + 2 d_out)` bytes for K neurons. Time: `2 R K (K + d_out)`
    operations and a Cholesky factorisation of a K x K matrix per candidate.

    Raises:
        ValueError: the bundle holds more than one FFN.
    """
    if reduced.batch != 1:
        raise ValueError(f"refit takes one FFN, the bundle has {reduced.batch}: select one")
    reduced = reduced.canonical()
    x, y = (rows.to(reduced.w_in.dtype) for rows in (statistics.x, statistics.y))
    held_out = statistics.held_out
    fitted, tested = (_moments(reduced, x[rows], y[rows]) for rows in (~held_out, held_out))
    everything = fitted + tested
    if fitted.rows == 0 or tested.rows == 0:
        return Refit(_shifted(reduced, _solve(everything, reduced, RIDGES[-1])), None, None)
    # Activations are rounded in the working precision: directions smaller than that are noise.
    ridges = [ridge for ridge in RIDGES if ridge >= torch.finfo(reduced.w_out.dtype).eps]
    changes = [_solve(fitted, reduced, ridge) for ridge in ridges]
    # |R - [H, 1] C|^2 up to |R|^2, which is the same for all.
    losses = torch.stack([((tested.gram @ c - 2.0 * tested.cross) * c).sum() for c in changes])
    best = int(losses.argmin())
    error = relative_error(_shifted(reduced, changes[best]).forward(x[held_out])[0], y[held_out])
    return Refit(_shifted(reduced, _solve(everything, reduced, ridges[best])), ridges[best], error)


def _moments(reduced: NeuronBundle, x: Tensor, y: Tensor) -> _Moments:
    K, d_out = reduced.w_out.shape[1:]
    gram = torch.zeros(K + 1, K + 1, dtype=torch.float64, device=x.device)
    cross = torch.zeros(K + 1, d_out, dtype=torch.float64, device=x.device)
    for rows, targets in zip(x.split(_CHUNK), y.split(_CHUNK), strict=True):
        hidden = reduced.hidden(rows)[0]
        residual = targets - hidden @ reduced.w_out[0]
        if reduced.b_out is not None:
            residual = residual - reduced.b_out[0]
        # In float64: centring the products by subtraction would leave a float32 Gram matrix indefinite.
        design = torch.nn.functional.pad(hidden.double(), (0, 1), value=1.0)
        gram += design.T @ design
        cross += design.T @ residual.double()
    return _Moments(gram, cross, len(x))


def _solve(moments: _Moments, reduced: NeuronBundle, ridge: float) -> Tensor:
    """`(K + 1, d_out)` float64: the changes of the output weights and, in the last row, of the bias."""
    total = moments.gram[-1, -1].clamp(min=1.0)
    mean, mean_residual = moments.gram[-1, :-1] / total, moments.cross[-1] / total
    gram, cross = moments.gram[:-1, :-1], moments.cross[:-1]
    if reduced.b_out is not None:
        # An unpenalised bias is the same as centred columns.
        gram = gram - total * torch.outer(mean, mean)
        cross = cross - total * torch.outer(mean, mean_residual)
    deviation = (gram.diagonal() / total).clamp(min=0.0).sqrt()
    alive = deviation > torch.finfo(reduced.w_out.dtype).eps * deviation.max()
    inverse = torch.where(alive, 1.0 / deviation.where(alive, torch.ones_like(deviation)), 0.0)
    normal = gram * torch.outer(inverse, inverse) / total
    # The diagonal of a silent neuron is the ridge alone: its change comes out as 0.
    normal.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(normal)
    change = torch.cholesky_solve(cross * inverse.unsqueeze(1) / total, factor) * inverse.unsqueeze(1)
    bias = mean_residual - mean @ change if reduced.b_out is not None else torch.zeros_like(mean_residual)
    return torch.cat([change, bias.unsqueeze(0)])


def _shifted(reduced: NeuronBundle, change: Tensor) -> NeuronBundle:
    w_out = (reduced.w_out[0].double() + change[:-1]).to(reduced.w_out.dtype).unsqueeze(0)
    b_out = reduced.b_out
    if b_out is not None:
        b_out = (b_out[0].double() + change[-1]).to(b_out.dtype).unsqueeze(0)
    return dataclasses.replace(reduced, w_out=w_out, b_out=b_out)
