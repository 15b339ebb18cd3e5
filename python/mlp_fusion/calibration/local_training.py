"""Local tuning: every reduced feed-forward layer (FFN) learns the original's outputs on the calibration rows.

No gradient passes from one FFN to another, nor through the model: FFNs of one shape are trained side by side as one
batched problem, on rows that calibration has kept. With f the reduced FFN and (x, y) the original's rows,

    min over all weights and biases of  |(f(x) - y) L|_F^2 / |y - mean y|_F^2

by Adam on mini-batches of all rows. Massive rows are scaled down (:meth:`FFNStatistics.row_weights`), and L weighs the
directions of the outputs by what they do to the model (see :mod:`mlp_fusion.calibration.sensitivity`), or is the
identity where the statistics have none. Half of a mini-batch are mixtures of rows, of which the original has been asked
(see :mod:`mlp_fusion.calibration.mixtures`). What is trained is the folded FFN, whose function has no scale in it, with
every tensor in units of its own root mean square: one learning rate then suits all tensors of all FFNs, whatever the
cluster sizes. The scale is taken out again afterwards and stays as it was.

Source: Adam (Kingma & Ba 2015); layer-wise reconstruction as in "AdaRound" (Nagel et al. 2020), weighed by what matters
to the model's output as in "BRECQ" (Li et al. 2021), there by the diagonal of the Fisher information.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlp_fusion.calibration.mixtures import Mixtures
from mlp_fusion.calibration.statistics import LEAST_ROWS, FFNStatistics
from mlp_fusion.neurons import NeuronBundle

#: Rows of a mini-batch.
BATCH_ROWS = 512
#: Largest step, in units of each tensor's root mean square; reached after the warm-up, then down to 0 by a cosine.
LEARNING_RATE = 3e-2
_WARM_UP = 20
#: Rows at most that are looked at before and after.
_LOOK_ROWS = 2048

_FIELDS = ("w_in", "w_gate", "b_in", "b_gate", "w_out", "b_out")


@dataclass(frozen=True, eq=False)
class LocallyTrained:
    """FFNs after local tuning.

    Attributes:
        bundle: B FFNs, canonical (`scale_exponent` 0), with the scale that they had; those whose error did not fall are
            as they came.
        before, after: `(B,)` float64, relative Frobenius errors `|W (f(x) - y) L| / |W y L|` on up to 2,048 of the
            rows, spread evenly over them, W their weights. NaN of what was not trained.
    """

    bundle: NeuronBundle
    before: Tensor
    after: Tensor


def train_locally(
    reduced: NeuronBundle,
    statistics: Sequence[FFNStatistics],
    *,
    steps: int,
    seed: int,
    originals: NeuronBundle | None = None,
    progress: Callable[[int], None] | None = None,
) -> LocallyTrained:
    """Train the reduced FFNs on the calibration rows.

    Args:
        reduced: B reduced FFNs of one shape, in any parameterization; silent neurons (of scale 0) stay silent.
        statistics: of the B originals, gathered together, so that their rows are of the same tokens; all of them with
            a `sensitivity`, or none.
        steps: mini-batches of 512 rows.
        seed: of the mini-batches. The same seed gives the same bits.
        originals: the B FFNs before they were reduced, for mixtures of rows; None: rows as they are, no mixtures.
        progress: called with the number of steps done, after each.

    FFNs with fewer than two rows per input come back as they are: training fits to chance what a ridge does not. (On
    MiniLM at a quarter of its width, 64 sentences, 3.6 rows per input, gain 0.009 of cosine; 16 sentences, 0.9 rows
    per input, lose 0.007.)

    Memory: four times the reduced FFNs' parameters, `4 d_out^2` bytes per FFN with a sensitivity, the activations of a
    mini-batch with their gradients, and in a sequential run, with originals, two copies of the rows' outputs. Time:
    `6 * 512 K (d + d_out)` operations per step and FFN (of gated ones, `6 * 512 K (2 d + d_out)`), a sixth of that for
    the N neurons of an original, and `4 * 512 d_out^2` with a sensitivity.

    Raises:
        ValueError: `steps` is negative, or there is not one entry of `statistics`, with the same rows, per FFN, or some
            have a sensitivity and others none.
    """
    if steps < 0:
        raise ValueError(f"steps {steps}: give 0 or more")
    if len(statistics) != reduced.batch or any(len(s.x) != len(statistics[0].x) for s in statistics):
        raise ValueError(f"{reduced.batch} FFNs need as many statistics, gathered together from the same tokens")
    if len({s.sensitivity is None for s in statistics}) > 1:
        raise ValueError("some of the statistics have a sensitivity and some have none: give it to all")
    reduced = reduced.canonical()
    count = len(statistics[0].x)
    if steps == 0 or count < LEAST_ROWS * statistics[0].x.shape[1]:
        unknown = torch.full((reduced.batch,), math.nan, dtype=torch.float64)
        return LocallyTrained(reduced, unknown, unknown)
    problem = _Problem(reduced, statistics, originals)
    looked_at = torch.arange(0, count, -(-count // _LOOK_ROWS), device=statistics[0].x.device)
    before = problem.errors(looked_at)
    # The second moment's memory is short: a few hundred steps are no time for a long one.
    optimizer = torch.optim.Adam(problem.parameters, lr=LEARNING_RATE, betas=(0.9, 0.99), eps=1e-12, foreach=True)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * _schedule(step, steps)
        batch = problem.batch(min(BATCH_ROWS, count), generator)
        optimizer.zero_grad()
        with torch.enable_grad():
            problem.loss(*batch).backward()
        optimizer.step()
        if progress is not None:
            progress(step + 1)
    after = problem.errors(looked_at)
    # An FFN that nothing was better for keeps its own bits.
    return LocallyTrained(problem.finished(after < before), before, after)


def _rows(statistics: Sequence[FFNStatistics], rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`(B, R, d)` and `(B, R, d_out)`: inputs and outputs of all FFNs."""
    x, y = (torch.stack([getattr(s, name)[rows] for s in statistics]).to(dtype) for name in ("x", "y"))
    return x, y


def _weights(statistics: Sequence[FFNStatistics], dtype: torch.dtype) -> Tensor | None:
    """`(B, d_out, d_out)`, every FFN's L; None where all errors count alike."""
    weights = [s.sensitivity for s in statistics if s.sensitivity is not None]
    return torch.stack(weights).to(dtype) if weights else None


def _row_weights(statistics: Sequence[FFNStatistics], dtype: torch.dtype) -> Tensor:
    """`(B, R, 1)`."""
    return torch.stack([s.row_weights() for s in statistics]).to(dtype).unsqueeze(-1)


def _weighed(rows: Tensor, row_weights: Tensor, weight: Tensor | None) -> Tensor:
    rows = rows * row_weights
    return rows if weight is None else rows @ weight


def _schedule(step: int, steps: int) -> float:
    """Share of the learning rate: up linearly, down by a cosine to 0 at the end."""
    warm_up = min(_WARM_UP, max(1, steps // 10))
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


class _Problem:
    """B folded FFNs with their rows, and their tensors as the optimiser sees them: in units of their own size."""

    def __init__(
        self,
        reduced: NeuronBundle,
        statistics: Sequence[FFNStatistics],
        originals: NeuronBundle | None,
    ) -> None:
        self._reduced, self._statistics = reduced, statistics
        self._mixtures = None if originals is None else Mixtures(originals, statistics)
        self._folded = reduced.parameterized("folded")
        self._dtype = self._folded.w_in.dtype
        alive = torch.ones_like(reduced.w_in[..., 0]) if reduced.scale is None else (reduced.scale != 0)
        self._alive = alive.to(self._dtype)
        self._weight = _weights(statistics, self._dtype)
        self._row_weights = _row_weights(statistics, self._dtype)
        # One FFN at a time: all their rows at once may be gigabytes.
        weighed = (s.y.to(self._dtype) * w for s, w in zip(statistics, self._row_weights, strict=True))
        spread = torch.stack([y.var(dim=0, correction=0).mean() for y in weighed])
        #: `(B,)` mean squares of the weighed outputs' entries about their means.
        self._spread = torch.where(spread > 0, spread, torch.ones_like(spread))
        self._units: dict[str, Tensor] = {}
        self.parameters: list[Tensor] = []
        for name in _FIELDS:
            tensor = getattr(self._folded, name)
            if tensor is not None:
                self._units[name] = self._unit(name, tensor)
                self.parameters.append((tensor / self._units[name]).requires_grad_())

    def _unit(self, name: str, tensor: Tensor) -> Tensor:
        """`(B, 1)` or `(B, 1, 1)`: what one unit of the parameter is worth.

        Biases are often 0 to begin with: an input bias goes with its weights, the output bias with the outputs.
        """
        if name == "b_out":
            return self._spread.sqrt().unsqueeze(1)
        weight = {"b_in": self._folded.w_in, "b_gate": self._folded.w_gate}.get(name, tensor)
        assert weight is not None
        size = weight.square().mean(dim=(1, 2)).sqrt()
        size = torch.where(size > 0, size, torch.ones_like(size))
        return size.reshape(-1, *[1] * (tensor.ndim - 1))

    def _bundle(self, parameters: Sequence[Tensor]) -> NeuronBundle:
        values: dict[str, Any] = {
            name: p * unit for (name, unit), p in zip(self._units.items(), parameters, strict=True)
        }
        values["w_out"] = values["w_out"] * self._alive.unsqueeze(-1)
        return dataclasses.replace(self._folded, **values)

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """`count` rows to fit to, half of them mixtures where there are originals: x, y, `(B, count, 1)` weights."""
        mixed = 0 if self._mixtures is None else count // 2
        first = self._statistics[0].x
        rows = torch.randint(len(first), (count - mixed,), generator=generator).to(first.device)
        x, y = _rows(self._statistics, rows, self._dtype)
        if self._mixtures is not None:
            more_x, more_y, most = self._mixtures.draw(mixed, generator)
            x, y, rows = torch.cat([x, more_x], dim=1), torch.cat([y, more_y], dim=1), torch.cat([rows, most])
        return x, y, self._row_weights[:, rows]

    def loss(self, x: Tensor, y: Tensor, row_weights: Tensor) -> Tensor:
        """Sum over problems of the mean squared weighed error, relative to the outputs' spread."""
        error = _weighed(self._bundle(self.parameters).forward(x) - y, row_weights, self._weight)
        return (error.square().mean(dim=(1, 2)) / self._spread).sum()

    @torch.no_grad()
    def errors(self, rows: Tensor) -> Tensor:
        """`(B,)` float64, on the CPU: relative weighed Frobenius errors on `rows`; NaN where the outputs are all 0."""
        x, y = _rows(self._statistics, rows, self._dtype)
        squares = [
            torch.linalg.vector_norm(
                _weighed(part, self._row_weights[:, rows], self._weight), dim=(1, 2), dtype=torch.float64
            ).square()
            for part in (self._bundle(self.parameters).forward(x) - y, y)
        ]
        return (squares[0] / squares[1]).sqrt().cpu()

    @torch.no_grad()
    def finished(self, better: Tensor) -> NeuronBundle:
        """The FFNs as they are now, with their scale, canonical; those that are not `better (B,)` as they came."""
        bundle = self._bundle(self.parameters)
        if self._reduced.scale is not None:
            bundle = bundle.unfolded(self._reduced.scale)
        return NeuronBundle.stack(
            [(bundle if better[n] else self._reduced).select(n) for n in range(self._reduced.batch)]
        )
