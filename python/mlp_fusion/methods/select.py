"""Greedy selection of neurons: the subset whose activations explain the FFN's outputs best.

Orthogonal matching pursuit over the columns of the activations A of one FFN on calibration rows, with the outputs Y as
the target: each step adds the neuron that lowers |Y - A_S V|_F most when all output weights V are fitted anew. Ranking
neurons one by one (`prune`) keeps neurons that say the same; this does not.

Source: Pati, Rezaiifar & Krishnaprasad 1993, for many targets at once (Tropp et al. 2006); here on Gram matrices, with
a partial Cholesky factorisation (Farahat et al. 2011, greedy column subset selection).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlp_fusion.calibration.refit import refit
from mlp_fusion.calibration.statistics import FFNStatistics
from mlp_fusion.errors import InputError
from mlp_fusion.methods import Reduction
from mlp_fusion.methods.prune import keep_neurons
from mlp_fusion.neurons import NeuronBundle

#: Rows that the activations are compared on.
SELECTION_ROWS = 4096
#: A neuron is spent when the selected ones explain all but this share of its variance.
_SPENT = 1e-5


def select(
    bundle: NeuronBundle, width: int, *, seed: int, statistics: Sequence[FFNStatistics] | None = None
) -> Reduction:
    """Keep the `width` neurons chosen greedily, their output weights fitted to the outputs. No scale.

    Memory: `4 N^2` bytes for N neurons, and 4,096 rows of activations, one FFN at a time. Time: `4096 N^2 + width N
    (width + 2 d_out)` multiplications per FFN.
    """
    assert statistics is not None
    reduced = []
    for n, s in enumerate(statistics):
        original = bundle.select(n)
        kept = greedy(original, s.rows(SELECTION_ROWS, seed=seed), width).sort().values
        reduced.append(refit(keep_neurons(original, kept.unsqueeze(0)), s).bundle)
    return Reduction.plain(NeuronBundle.stack(reduced))


def greedy(bundle: NeuronBundle, x: Tensor, width: int) -> Tensor:
    """`(width,)` neurons of `bundle` (B = 1) in order of choice, by their activations on the rows `x`.

    Neurons that the others explain follow in order of their number.
    """
    hidden = bundle.hidden(x.to(bundle.w_in.dtype))[0]
    hidden = hidden - hidden.mean(dim=0)
    gram = hidden.T @ hidden
    cross = gram @ bundle.canonical().w_out[0]
    if not bool(gram.diagonal().isfinite().all() & cross.isfinite().all()):
        raise InputError("activations are too large to be compared by method 'select': use another method")
    variance = gram.diagonal().clone()
    least = _SPENT * variance.clamp(min=torch.finfo(variance.dtype).tiny)
    factor = gram.new_zeros(width, len(gram))
    chosen: list[int] = []
    for step in range(width):
        gain = torch.where(variance > least, cross.square().sum(dim=1) / variance, -torch.ones_like(variance))
        best = int(gain.argmax())
        if gain[best] < 0:
            break
        chosen.append(best)
        column = (gram[best] - factor[:step].T @ factor[:step, best]) / variance[best].sqrt()
        factor[step] = column
        cross -= torch.outer(column, cross[best] / column[best])
        variance = variance - column.square()
        variance[best] = 0.0
    rest = sorted(set(range(len(gram))) - set(chosen))
    return torch.tensor(chosen + rest[: width - len(chosen)], dtype=torch.int64, device=x.device)
