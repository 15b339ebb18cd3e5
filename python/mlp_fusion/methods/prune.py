"""Structured pruning: keep the neurons that matter most, drop the others whole.

A neuron is its row of the input weights *and* its row of the output weights; they are ranked together. (Ranking the
two matrices by themselves, as the published baseline does, keeps halves that do not belong together.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from mlp_fusion.calibration.statistics import FFNStatistics
from mlp_fusion.methods import Reduction
from mlp_fusion.methods.fusion import importance, in_range
from mlp_fusion.neurons import UNNAMED, NeuronBundle


def prune(
    bundle: NeuronBundle, width: int, *, seed: int, statistics: Sequence[FFNStatistics] | None = None
) -> Reduction:
    """Keep the `width` neurons of greatest importance; there is no chance in it, and no scale.

    Importance is the variance of the activation times |w_out|^2 with calibration, |w_in| |w_out| without. With
    calibration, what dropped neurons add on average goes into the output bias, where there is one.

    Source: the joint ranking as in LLM-Pruner (arXiv 2305.11627). With calibration and without a refit it is FLAP
    (arXiv 2312.11983) at one share for all FFNs: its fluctuation metric and its compensation, but that FLAP gives an
    output bias to FFNs that have none.
    """
    scores = joint_norms(bundle) if statistics is None else importance(bundle, statistics)
    reduced = keep_best(bundle, scores, width)
    return Reduction.plain(reduced if statistics is None else compensate(reduced, statistics))


def joint_norms(bundle: NeuronBundle) -> Tensor:
    """`(B, N)`: the norm of each neuron's input weights, gate included, times the norm of its output weights."""
    inputs = bundle.w_in if bundle.w_gate is None else torch.cat([bundle.w_gate, bundle.w_in], dim=-1)
    outputs = bundle.parameterized("folded").w_out
    size = torch.linalg.vector_norm(in_range(inputs), dim=-1), torch.linalg.vector_norm(in_range(outputs), dim=-1)
    return size[0].double() * size[1] if any(s.dtype == torch.float64 for s in size) else size[0] * size[1]


def keep_best(bundle: NeuronBundle, scores: Tensor, width: int) -> NeuronBundle:
    """The `width` neurons of every problem with the greatest `scores (B, N)`, in their order; of equals, the first."""
    kept = scores.sort(dim=1, descending=True, stable=True).indices[:, :width]
    return keep_neurons(bundle, kept.sort(dim=1).values)


def keep_neurons(bundle: NeuronBundle, kept: Tensor) -> NeuronBundle:
    """The neurons `kept (B, K)` of every problem, as they are."""
    bundle = bundle.canonical()
    index = kept.unsqueeze(-1)
    rows = bundle.vectors()
    scale = None if bundle.scale is None else bundle.scale.gather(1, kept)
    return bundle.with_vectors(rows.gather(1, index.expand(-1, -1, rows.shape[-1])), scale)


def compensate(reduced: NeuronBundle, statistics: Sequence[FFNStatistics]) -> NeuronBundle:
    """`reduced` with an output bias under which the mean output over the calibration rows is the original's.

    As it is where it has no output bias, or a function that cannot be computed.
    """
    if reduced.b_out is None or reduced.activation == UNNAMED:
        return reduced
    shifts = []
    for n, s in enumerate(statistics):
        error = s.y.to(reduced.w_in.dtype) - reduced.select(n).forward(s.x.to(reduced.w_in.dtype))[0]
        shifts.append(error.mean(dim=0))
    return dataclasses.replace(reduced, b_out=reduced.b_out + torch.stack(shifts))
