"""A random subset of the neurons: the baseline that every method which looks at the weights should beat.

Source: random pruning as in "The Unreasonable Effectiveness of Random Pruning" (Liu et al. 2022, arXiv 2202.02643).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mlp_fusion.calibration.statistics import FFNStatistics
from mlp_fusion.methods import Reduction
from mlp_fusion.methods.prune import keep_neurons
from mlp_fusion.neurons import NeuronBundle


def random(
    bundle: NeuronBundle, width: int, *, seed: int, statistics: Sequence[FFNStatistics] | None = None
) -> Reduction:
    """Keep `width` neurons drawn by `seed`, each subset as likely as any other; no scale.

    Every problem of the bundle keeps the same ones, in their order. They are drawn on the CPU, so that they are the
    same on every device.
    """
    drawn = torch.randperm(bundle.width, generator=torch.Generator().manual_seed(seed))[:width]
    kept = drawn.sort().values.to(bundle.w_in.device).expand(bundle.batch, -1)
    return Reduction.plain(keep_neurons(bundle, kept))
