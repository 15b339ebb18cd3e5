"""Rows beyond those that calibration has kept: mixtures of two, and what the original FFN makes of them.

A reduced FFN has more weights than a few thousand tokens can tell; but what it is to compute is known everywhere. With
m the mean of the rows x, and c^2 + s^2 = 1,

    z = m + c (x_i - m) + s (x_j - m)

has the mean and the covariance of the rows, and lies near them where s is small. Its target is f(z), f the original,
plus the same mixture of what the targets of i and j have beyond f's outputs, as they do in a sequential run.

Source: in the way of "mixup" (Zhang et al., ICLR 2018, arXiv 1710.09412), which mixes labels, too; here the original is
asked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlp_fusion.calibration.statistics import FFNStatistics
from mlp_fusion.neurons import NeuronBundle

#: Largest s; it is drawn uniformly from 0 on.
LARGEST_SHARE = 0.6


class Mixtures:
    """Mixtures of the rows of B FFNs side by side, whose statistics have rows of the same tokens.

    Memory: in a sequential run, a copy of what those rows' targets have beyond the original's outputs. Time of a drawn
    row: the original's forward pass.
    """

    def __init__(self, originals: NeuronBundle, statistics: Sequence[FFNStatistics]) -> None:
        self._originals, self._statistics = originals, statistics
        dtype = originals.w_in.dtype
        found = [None if s.beyond is None else s.beyond.to(dtype) for s in statistics]
        self._beyond = [None if more is None else (more, more.mean(dim=0)) for more in found]
        self._mean = torch.stack([s.x.to(dtype).mean(dim=0, keepdim=True) for s in statistics])

    @torch.no_grad()
    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """`(B, count, d)` inputs, `(B, count, d_out)` targets, and the `(count,)` rows that are most of each mixture.

        The generator is one of the CPU; every FFN gets mixtures of the same tokens.
        """
        rows = self._statistics[0].x
        first, second = torch.randint(len(rows), (2, count), generator=generator).to(rows.device)
        s = torch.rand(count, 1, generator=generator, dtype=torch.float64) * LARGEST_SHARE
        shares = ((1.0 - s.square()).sqrt(), s)
        x = self._mixed(shares, self._inputs(first), self._inputs(second), self._mean)
        y = self._originals.forward(x)
        for own, more in zip(y, self._beyond, strict=True):
            if more is not None:
                beyond, mean = more
                own += self._mixed(shares, beyond[first], beyond[second], mean)
        return x, y, first

    def _inputs(self, rows: Tensor) -> Tensor:
        return torch.stack([s.x[rows] for s in self._statistics]).to(self._mean.dtype)

    @staticmethod
    def _mixed(shares: tuple[Tensor, Tensor], first: Tensor, second: Tensor, mean: Tensor) -> Tensor:
        c, s = (share.to(first) for share in shares)
        return mean + c * (first - mean) + s * (second - mean)
