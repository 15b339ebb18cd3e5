"""FASP: Wanda's score for columns, then the remaining output weights fitted to what the FFN put out.

The restoration is a ridge regression of the outputs on the activations of the neurons that are kept, with a ridge just
large enough for the normal equations to be solved. This project's refit differs in what it holds on to: it chooses its
ridge on held-out text, and shrinks towards the weights at hand instead of towards 0.

Source: FASP (arXiv 2501.09412). The ridge is a share of each neuron's own mean square instead of a constant, so that it
has no unit; an FFN with output bias is fitted with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mlp_fusion.calibration.statistics import FFNStatistics
from mlp_fusion.methods import Reduction
from mlp_fusion.methods.obs import least_squares
from mlp_fusion.methods.prune import keep_best
from mlp_fusion.methods.wanda import column_scores
from mlp_fusion.neurons import NeuronBundle

#: Of each neuron's mean square: about the rounding of a float32 product of a thousand neurons.
_RIDGE = 1e-4


def fasp(
    bundle: NeuronBundle, width: int, *, seed: int, statistics: Sequence[FFNStatistics] | None = None
) -> Reduction:
    """Keep the neurons that `wanda` keeps, with output weights and bias fitted to the outputs; no scale, no chance.

    Memory: `16 width^2` bytes, one FFN at a time. Time, with R rows: `2 R width (width + d + d_out)` operations.

    Raises:
        InputError: activations whose products leave the range of their dtype.
    """
    assert statistics is not None
    kept = keep_best(bundle, column_scores(bundle, statistics), width)
    restored = []
    for n, s in enumerate(statistics):
        own = kept.select(n)
        problem = least_squares(own, s, damping=_RIDGE, anchored=False)
        restored.append(problem.reduced(own, torch.arange(width, device=own.w_in.device)))
    return Reduction.plain(NeuronBundle.stack(restored))
