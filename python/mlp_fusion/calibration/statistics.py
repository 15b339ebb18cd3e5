"""Streamed statistics of feed-forward layers (FFNs): what methods and corrections learn from calibration text.

One run of the model serves every FFN. Each keeps moments of its inputs and activations over all tokens, and a uniform
sample of its input and output rows, from which fits are made.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlp_fusion.families import Architecture, FFNSite
from mlp_fusion.neurons import NeuronBundle
from mlp_fusion.running.batches import Batch, take_batches, token_mask
from mlp_fusion.running.runner import not_finite
from mlp_fusion.running.taps import Taps, stream_activations

#: Most input rows kept per FFN, and the most bytes that they may take, unless the caller asks for a number of rows.
CALIBRATION_ROWS = 16_384
_ROW_BYTES = 256 * 2**20
#: Tokens after which calibration text that may be endless is cut.
CALIBRATION_TOKENS = 2**18
#: One sequence in this many is held out from fits, to choose their regularisation on.
_HELD_OUT = 5


@dataclass(frozen=True, eq=False)
class FFNStatistics:
    """What calibration knows of one FFN with `d` inputs and N neurons.

    Attributes:
        tokens: token positions seen.
        input_moment: `(d + 1, d + 1)` float64, E[[x, 1] [x, 1]^T] over all of them.
        hidden_mean, hidden_variance: `(N,)` float64, of what the output projection gets, over all of them.
        x, y: `(R, d)` inputs and `(R, d_out)` outputs, a uniform sample without replacement of the positions, in
            order; the same positions at every FFN; in the model's dtype, on its device.
        sequence: `(R,)` int64, on the CPU, which sequence a row comes from, counted over the calibration text.
        sensitivity: `(d_out, d_out)` L with `|e L|^2` what an error e of the outputs does to the model, as
            :func:`mlp_fusion.calibration.output_sensitivities` returns it; None: all errors count alike.
    """

    tokens: int
    input_moment: Tensor
    hidden_mean: Tensor
    hidden_variance: Tensor
    x: Tensor
    y: Tensor
    sequence: Tensor
    sensitivity: Tensor | None = None

    @property
    def held_out(self) -> Tensor:
        """`(R,)` bool: rows for choosing regularisation, every fifth sequence; the last fifth of fewer than five."""
        present, index = self.sequence.unique(return_inverse=True)
        if len(present) >= _HELD_OUT:
            mask: Tensor = index % _HELD_OUT == _HELD_OUT - 1
        else:
            mask = torch.arange(len(index)) >= len(index) - len(index) // _HELD_OUT
        return mask.to(self.x.device)

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

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.tokens = self._filled = 0
        self._moment = self._mean = self._squares = torch.zeros(())
        self._rows: tuple[Tensor, Tensor] | None = None

    def add(self, x: Tensor, hidden: Tensor, y: Tensor, taken: Tensor) -> None:
        """Add rows `x (T, d)`, `hidden (T, N)`, `y (T, d_out)`; those numbered `taken` are kept."""
        count = len(x)
        if self._rows is None:
            self._rows = x.new_zeros(self.capacity, x.shape[1]), y.new_zeros(self.capacity, y.shape[1])
            side, N = x.shape[1] + 1, hidden.shape[1]
            self._moment = x.new_zeros(side, side, dtype=torch.float64)
            self._mean, self._squares = (x.new_zeros(N, dtype=torch.float64) for _ in range(2))
        if count == 0:
            return
        end = self._filled + len(taken)
        for kept, new in zip(self._rows, (x, y), strict=True):
            kept[self._filled : end] = new[taken.to(x.device)]
        self._filled = end
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

    def finish(self, sequence: Tensor) -> FFNStatistics:
        """The statistics; `sequence` says what each row that was kept comes from.

        Raises:
            InputError: something that passed through the FFN is not finite.
        """
        assert self._rows is not None
        x, y = self._rows
        if not all(bool(t.isfinite().all()) for t in (self._moment, self._squares, y)):
            raise not_finite("on the calibration text, an FFN's inputs or outputs", y.dtype)
        return FFNStatistics(
            tokens=self.tokens,
            input_moment=self._moment / self.tokens,
            hidden_mean=self._mean,
            hidden_variance=self._squares / self.tokens,
            x=x,
            y=y,
            sequence=sequence,
        )


class StreamPlan:
    """Which positions of which batch are kept as rows: drawn once, uniformly, and the same for every FFN.

    Attributes:
        capacity: rows kept of each FFN.
        taken: per batch, which of its unmasked positions, in order.
        sequence: `(capacity,)` int64, which sequence of the text each row comes from.
    """

    def __init__(self, batches: Sequence[Batch], capacity: int, seed: int) -> None:
        masks = [token_mask(batch) for batch in batches]
        counts = [int(mask.sum()) for mask in masks]
        total = sum(counts)
        self.capacity = min(capacity, total)
        chosen = torch.zeros(total, dtype=torch.bool)
        chosen[torch.randperm(total, generator=torch.Generator().manual_seed(seed))[: self.capacity]] = True
        self.taken = [part.nonzero().squeeze(1) for part in chosen.split(counts)]
        owners = [mask.nonzero()[:, 0] for mask in masks]
        first = [0, *itertools.accumulate(len(mask) for mask in masks)]
        self.sequence = torch.cat([n + o[t] for n, o, t in zip(first, owners, self.taken, strict=False)])


def take_calibration(calibration: Batch | Iterable[Batch]) -> list[dict[str, Tensor]]:
    """The batches of a calibration text: a list to its end, any other iterable for 262,144 tokens.

    Raises:
        InputError: there is no batch or no token.
    """
    finite = isinstance(calibration, Sequence)
    return take_batches(calibration, sys.maxsize if finite else CALIBRATION_TOKENS, "calibration")


def row_capacity(rows: int | None, d: int, itemsize: int) -> int:
    """Rows of `d` inputs that one FFN's sample may hold; None: `CALIBRATION_ROWS`, or fewer that fit into 256 MiB."""
    return rows if rows is not None else max(1, min(CALIBRATION_ROWS, _ROW_BYTES // (d * itemsize)))


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
        calibration: batches as a tokenizer returns them; masked positions are left out. A list is read to its end,
            any other iterable for 262,144 tokens.
        seed: of the rows that are kept.
        rows: how many of those are kept, or all there are; None for 16,384, or fewer that fit into 256 MiB.

    Returns:
        One `FFNStatistics` per site, in their order.

    Raises:
        InputError: there is no batch or no token, or the model cannot run on one.
    """
    batches = take_calibration(calibration)
    inputs = architecture.read(sites[0]).w_in
    plan = StreamPlan(batches, row_capacity(rows, inputs.shape[-1], inputs.element_size()), seed)
    collectors = [Collector(plan.capacity) for _ in sites]
    done = [0] * len(sites)

    def visit(number: int, mask: Tensor, taps: Taps) -> None:
        mask = mask.to(taps.x.device)
        collectors[number].add(taps.x[mask], taps.hidden[mask], taps.y[mask], plan.taken[done[number]])
        done[number] += 1

    stream_activations(model, architecture, sites, batches, visit)
    return [collector.finish(plan.sequence) for collector in collectors]
