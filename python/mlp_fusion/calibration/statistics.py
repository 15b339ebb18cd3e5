"""Streamed statistics of feed-forward layers (FFNs): what methods and corrections learn from calibration text.

One run of the model serves every FFN. Each keeps moments of its inputs and activations over all tokens, and a uniform
sample of its input and output rows, from which fits are made.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlp_fusion.families import Architecture, FFNSite
from mlp_fusion.neurons import NeuronBundle
from mlp_fusion.running.batches import Batch, batches_of
from mlp_fusion.running.runner import not_finite
from mlp_fusion.running.sampling import RowPlan, RowSample
from mlp_fusion.running.taps import Taps, Visitor, stream_activations

#: Most input rows kept per FFN, and the most bytes that they may take, unless the caller asks for a number of rows.
CALIBRATION_ROWS = 16_384
#: Rows that an FFN has to have per input to be trained on: what fewer say beyond a least-squares fit is chance.
LEAST_ROWS = 2
_ROW_BYTES = 256 * 2**20
#: Tokens after which calibration text that may be endless is cut.
CALIBRATION_TOKENS = 2**18
#: Outputs that are so many times as large as the median's count as if no larger, where that is asked for.
_MASSIVE = 3.0
#: One sequence in this many is held out from fits, to choose their regularisation on.
_HELD_OUT = 5


@dataclass(frozen=True, eq=False)
class FFNStatistics:
    """What calibration knows of one FFN with `d` inputs and N neurons.

    Attributes:
        tokens: token positions seen; 0 of an expert that none was routed to.
        input_moment: `(d + 1, d + 1)` float64, E[[x, 1] [x, 1]^T] over all of them.
        hidden_mean, hidden_variance: `(N,)` float64, of what the output projection gets, over all of them.
        x, y: `(R, d)` inputs and `(R, d_out)` outputs, a uniform sample without replacement of the positions, in
            order; the same positions at every FFN that sees the text's tokens; in the model's dtype, on its device.
        sequence: `(R,)` int64, on the CPU, which sequence a row comes from, counted over the calibration text.
        sensitivity: `(d_out, d_out)` L with `|e L|^2` what an error e of the outputs does to the model, as
            :func:`mlp_fusion.calibration.output_sensitivities` returns it; None: all errors count alike.
        beyond: `(R, d_out)` what is in `y` beyond what the FFN itself puts out for `x`, in a sequential run; None:
            nothing is.
    """

    tokens: int
    input_moment: Tensor
    hidden_mean: Tensor
    hidden_variance: Tensor
    x: Tensor
    y: Tensor
    sequence: Tensor
    sensitivity: Tensor | None = None
    beyond: Tensor | None = None

    @property
    def held_out(self) -> Tensor:
        """`(R,)` bool: rows for choosing regularisation, every fifth sequence; the last fifth of fewer than five."""
        present, index = self.sequence.unique(return_inverse=True)
        if len(present) >= _HELD_OUT:
            mask: Tensor = index % _HELD_OUT == _HELD_OUT - 1
        else:
            mask = torch.arange(len(index)) >= len(index) - len(index) // _HELD_OUT
        return mask.to(self.x.device)

    def row_weights(self) -> Tensor:
        """`(R,)` weights of the rows where errors are to be small everywhere: 1, but less of massive outputs.

        Some models have tokens whose outputs are hundreds of times as large as all others' (the first of a text, an
        attention sink). Outputs count as if at most three times as large as the median of those that are not held out.
        float32 at least.
        """
        size = torch.linalg.vector_norm(self.y, dim=1, dtype=torch.promote_types(self.y.dtype, torch.float32))
        fitted = size[~self.held_out & (size > 0)]
        most = _MASSIVE * fitted.median() if len(fitted) else size.new_tensor(torch.inf)
        return torch.where(size > most, most / size.where(size > most, torch.ones_like(size)), 1.0)

    def rows(self, count: int, *, seed: int) -> Tensor:
        """Up to `count` of the rows `x`, drawn uniformly: `(min(count, R), d)`, float32 at least."""
        chosen = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(seed))[:count].sort().values
        x = self.x[chosen.to(self.x.device)]
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def importance(self, bundle: NeuronBundle) -> Tensor:
        """`(N,)`: variance of each neuron's activation times the squared norm of its output weights.

        That is the mean squared change of the outputs when a neuron's activation is replaced by its mean. float32, or
        float64 where that is too narrow.
        """
        size = bundle.parameterized("folded").w_out[0].double().square().sum(dim=1)
        wide = self.hidden_variance * size
        narrow = wide.float()
        fits = narrow.isfinite() & ((narrow > 0) == (wide > 0))
        return narrow if bool(fits.all()) else wide

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in vars(self).values() if isinstance(t, Tensor))


class Collector:
    """Accumulates the statistics of one FFN; `add` every batch, then `finish`."""

    def __init__(self, sample: RowSample, *, may_be_empty: bool = False) -> None:
        self._sample, self._may_be_empty = sample, may_be_empty
        self.tokens = 0
        self._moment = self._mean = self._squares = torch.zeros(())

    def add(self, mask: Tensor, x: Tensor, hidden: Tensor, y: Tensor, beyond: Tensor | None = None) -> None:
        """Add the rows `x (T, d)`, `hidden (T, N)`, `y (T, d_out)` of the T positions in `mask`; some are kept.

        `beyond (T, d_out)` is in `y` already, with every batch or with none.
        """
        count = len(x)
        self._sample.add(mask, x, y, *(() if beyond is None else (beyond,)))
        if self._moment.ndim == 0:
            side, N = x.shape[1] + 1, hidden.shape[1]
            self._moment = x.new_zeros(side, side, dtype=torch.float64)
            self._mean, self._squares = (x.new_zeros(N, dtype=torch.float64) for _ in range(2))
        if count == 0:
            return
        ones = torch.nn.functional.pad(x.to(torch.promote_types(x.dtype, torch.float32)), (0, 1), value=1.0)
        self._moment += ones.T @ ones
        # Chan, Golub and LeVeque's pairwise update: sums of squares lose the variance of a large mean. Both sums are
        # products, which are several times as fast as reductions over rows.
        working = hidden.to(ones.dtype)
        row = ones[:, -1] / count
        mean = row @ working
        variance = row @ (working - mean).square_()
        total = self.tokens + count
        shift = mean.double() - self._mean
        self._squares += variance.double() * count + shift.square() * (self.tokens * count / total)
        self._mean += shift * (count / total)
        self.tokens = total

    def finish(self) -> FFNStatistics:
        """The statistics.

        Raises:
            InputError: no position counts, or something that passed through the FFN is not finite.
        """
        (x, y, *beyond), sequence = self._sample.finish(may_be_empty=self._may_be_empty)
        if not all(bool(t.isfinite().all()) for t in (self._moment, self._squares, y)):
            raise not_finite("on the calibration text, an FFN's inputs or outputs", y.dtype)
        return FFNStatistics(
            tokens=self.tokens,
            input_moment=self._moment / max(self.tokens, 1),
            hidden_mean=self._mean,
            hidden_variance=self._squares / max(self.tokens, 1),
            x=x,
            y=y,
            sequence=sequence,
            beyond=beyond[0] if beyond else None,
        )


def take_calibration(model: nn.Module, calibration: Batch | Iterable[Batch]) -> list[dict[str, Tensor]]:
    """The batches that `model` is calibrated on: a list to its end, any other iterable for 262,144 tokens.

    Raises:
        InputError: there is no batch or no token.
    """
    tokens = sys.maxsize if isinstance(calibration, Sequence) else CALIBRATION_TOKENS
    return batches_of(model, calibration, tokens, "calibration")


def warn_of_few(tokens: int, weights: Sequence[Tensor], rows: int | None) -> None:
    """Say so where an FFN keeps fewer than two of the text's tokens for each of its inputs: see local training.

    Args:
        tokens: of the text.
        weights: input weights of the FFNs, `(..., N, d)`.
        rows: that each keeps, as in :func:`collect`.
    """
    widest = max(weights, key=lambda weight: weight.shape[-1])
    inputs = widest.shape[-1]
    rows = min(tokens, row_capacity(rows, inputs, widest.element_size()))
    if rows < LEAST_ROWS * inputs:
        warnings.warn(
            f"{rows:,} tokens of calibration text are fewer than {LEAST_ROWS} for each of {inputs:,} inputs: too few "
            "to correct FFNs by, which are not trained on them; give a few hundred sentences, or more synthetic tokens",
            stacklevel=5,
        )


def row_capacity(rows: int | None, d: int, itemsize: int) -> int:
    """Rows of `d` inputs that one FFN's sample may hold; None: `CALIBRATION_ROWS`, or fewer that fit into 256 MiB."""
    return rows if rows is not None else max(1, min(CALIBRATION_ROWS, _ROW_BYTES // (d * itemsize)))


def collector_of(architecture: Architecture, site: FFNSite, plan: RowPlan, rows: int | None) -> Collector:
    """What gathers the statistics of an FFN; `rows` as in :func:`collect`."""
    inputs = architecture.read(site).w_in
    capacity = row_capacity(rows, inputs.shape[-1], inputs.element_size())
    return Collector(RowSample(plan, capacity), may_be_empty=site.is_expert)


def adding_to(collectors: Sequence[Collector]) -> Visitor:
    """Adds what passes through each FFN to its collector."""

    def visit(number: int, mask: Tensor, taps: Taps) -> None:
        counted = mask.to(taps.x.device)
        collectors[number].add(mask, taps.x[counted], taps.hidden[counted], taps.y[counted])

    return visit


def collect(
    model: nn.Module,
    architecture: Architecture,
    sites: Sequence[FFNSite],
    calibration: Batch | Iterable[Batch],
    *,
    seed: int,
    rows: int | None = None,
) -> list[FFNStatistics]:
    """Statistics of every FFN in `sites`, from one run of `model` over the calibration text.

    Memory beside the model: per FFN `8 ((d + 1)^2 + 2 N)` bytes of moments and `rows` rows of inputs and of outputs in
    the model's dtype; in passing, the activations of one FFN on one batch. At 384 inputs and 1,536 neurons (MiniLM)
    and 16,384 rows that is 49 MiB per FFN. Time: the run itself, and `2 T d^2` operations per FFN.

    Args:
        model: an unfused model.
        architecture, sites: its architecture and the FFNs wanted.
        calibration: batches as a tokenizer or the model's processor returns them; masked positions are left out, see
            :func:`mlp_fusion.running.positions.counted`. A list is read to its end, any other iterable for 262,144
            tokens, or about as many patches or frames.
        seed: of the rows that are kept.
        rows: how many of those are kept, or all there are; None for 16,384, or fewer that fit into 256 MiB.

    Returns:
        One `FFNStatistics` per site, in their order.

    Raises:
        InputError: there is no batch or no token, or the model cannot run on one.
    """
    batches = take_calibration(model, calibration)
    plan = RowPlan(batches, seed)
    collectors = [collector_of(architecture, site, plan, rows) for site in sites]
    stream_activations(model, architecture, sites, batches, adding_to(collectors))
    return [collector.finish() for collector in collectors]
