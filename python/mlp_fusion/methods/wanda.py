"""Wanda's score for whole neurons: the size of the activation times that of the weights behind it.

Wanda scores a weight by its absolute value times the root mean square of the input that it multiplies. A neuron's
weights behind the activation share that input, and are dropped together: their scores are added up. The sum is the form
that structured pruning took over (`Wanda-sp` beside FLAP; FASP's column metric); the root of the sum of squares would
rank by |w_out| in place of its absolute sum, which is what `prune` does with variances.

Source: Wanda (arXiv 2306.11695), section 3; the sum over a column as in FASP (arXiv 2501.09412) and in the baseline
of FLAP (arXiv 2312.11983).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlp_fusion.calibration.statistics import FFNStatistics
from mlp_fusion.methods import Reduction
from mlp_fusion.methods.prune import keep_best
from mlp_fusion.neurons import NeuronBundle


def wanda(
    bundle: NeuronBundle, width: int, *, seed: int, statistics: Sequence[FFNStatistics] | None = None
) -> Reduction:
    """Keep the `width` neurons with the greatest :func:`column_scores`, as they are; no scale, no chance."""
    assert statistics is not None
    return Reduction.plain(keep_best(bundle, column_scores(bundle, statistics), width))


def column_scores(bundle: NeuronBundle, statistics: Sequence[FFNStatistics]) -> Tensor:
    """`(B, N)` float64: the root mean square of each neuron's activation over the text, times the sum of |w_out|."""
    squares = torch.stack([s.hidden_variance + s.hidden_mean.square() for s in statistics])
    return squares.sqrt() * bundle.parameterized("folded").w_out.double().abs().sum(dim=2)
