"""The width stage of 2SSP: keep the neurons that are most active, whatever is behind them.

A neuron's score is the norm of its activations over the tokens of a sequence, on average over sequences: a neuron that
is strong in one sequence alone counts less than by the root mean square over all tokens. Its output weights have no
part in it. The second stage, which drops attention, is not this project's business.

Source: 2SSP (arXiv 2501.17771), first stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlp_fusion.calibration.statistics import FFNStatistics
from mlp_fusion.methods import Reduction
from mlp_fusion.methods.prune import keep_best
from mlp_fusion.neurons import NeuronBundle

#: Rows whose activations are held at a time.
_CHUNK = 2048


def twossp(
    bundle: NeuronBundle, width: int, *, seed: int, statistics: Sequence[FFNStatistics] | None = None
) -> Reduction:
    """Keep the `width` neurons with the greatest :func:`activity`, as they are; no scale, no chance."""
    assert statistics is not None
    scores = torch.stack([activity(bundle.select(n), s) for n, s in enumerate(statistics)])
    return Reduction.plain(keep_best(bundle, scores, width))


def activity(bundle: NeuronBundle, statistics: FFNStatistics) -> Tensor:
    """`(N,)` float64: the norm of each neuron's activations on the rows of one sequence, the mean over sequences.

    The rows are a uniform sample of a sequence's tokens, so that its norms are all smaller by about one factor.

    Args:
        bundle: one FFN, B = 1.
        statistics: of it, with R rows. `2 R N d` operations, and 2,048 rows of activations in memory.
    """
    _, counts = statistics.sequence.unique_consecutive(return_counts=True)
    total = torch.zeros(bundle.width, dtype=torch.float64, device=statistics.x.device)
    for x in statistics.x.to(bundle.w_in.dtype).split(counts.tolist()):
        squares = torch.zeros_like(total)
        for rows in x.split(_CHUNK):
            squares += bundle.hidden(rows)[0].double().square().sum(dim=0)
        total += squares.sqrt()
    return total / len(counts)
