"""Gaussian sketch: random combinations of neurons, S^T W_in and S^T W_out with one random matrix S.

E[S S^T] is the identity, so that a *linear* FFN would keep its outputs on average; an FFN with an activation does not.

Source: a baseline of MLP Fusion (arXiv 2307.08941).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mlp_fusion.calibration.statistics import FFNStatistics
from mlp_fusion.methods import Reduction
from mlp_fusion.neurons import NeuronBundle


def sketch(
    bundle: NeuronBundle, width: int, *, seed: int, statistics: Sequence[FFNStatistics] | None = None
) -> Reduction:
    """`width` random combinations, with weights from N(0, 1 / width); every problem has the same S. No scale.

    S is drawn in float64 on the CPU, so that it is the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, bundle.width, generator=generator, dtype=torch.float64) / width**0.5
    rows = bundle.parameterized("folded").vectors()
    mixed = mixing.to(rows.device, rows.dtype) @ rows
    return Reduction.plain(bundle.with_vectors(mixed, None))
