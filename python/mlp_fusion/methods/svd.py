"""Truncated singular value decomposition of each weight matrix, at the parameter count of the narrower FFN.

All neurons stay; each `(N, d)` matrix becomes the product of an `(N, r)` and an `(r, d)` one. A rank r with
`r (N + d) <= K d` costs no more parameters than K neurons do.

Source: Eckart & Young 1936; a baseline of MLP Fusion (arXiv 2307.08941).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mlp_fusion.calibration.statistics import FFNStatistics
from mlp_fusion.methods import Reduction
from mlp_fusion.neurons import NeuronBundle


def svd(bundle: NeuronBundle, width: int, *, seed: int, statistics: Sequence[FFNStatistics] | None = None) -> Reduction:
    """Every weight matrix of `bundle` at rank :func:`rank_for`, multiplied out: N neurons, as before."""
    plain = bundle.parameterized("folded")
    named = {"w_gate": plain.w_gate, "w_in": plain.w_in, "w_out": plain.w_out}
    changes: dict[str, Any] = {name: _truncated(w, width) for name, w in named.items() if w is not None}
    return Reduction.plain(dataclasses.replace(plain, **changes))


def rank_for(width: int, neurons: int, d: int) -> int:
    """The largest rank whose two factors of an `(neurons, d)` matrix have no more entries than `width` rows; >= 1."""
    return max(1, min(width * d // (neurons + d), neurons, d))


def _truncated(weight: Tensor, width: int) -> Tensor:
    rank = rank_for(width, weight.shape[1], weight.shape[2])
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return (left[..., :rank] * values[..., None, :rank]) @ right[:, :rank]
