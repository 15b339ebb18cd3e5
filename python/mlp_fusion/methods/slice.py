"""Slicing of directions, not of neurons: inputs and outputs are projected onto their leading principal components.

SliceGPT rotates a residual stream to its principal components and deletes the last of them from every matrix. Here that
is done to one FFN alone, which keeps its N neurons: the input weights see the leading components of the inputs, and the
outputs lie in the leading components of the outputs. Nothing next to an FFN absorbs the rotations then, so that their
parameters are counted: it is measured at the cost of the narrower FFN.

Source: SliceGPT (arXiv 2401.15024), sections 3.3 and 3.4; the components are those of second moments, not centred.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from mlp_fusion.calibration.statistics import FFNStatistics
from mlp_fusion.methods import Reduction
from mlp_fusion.methods.svd import rank_for
from mlp_fusion.neurons import NeuronBundle


def slice(
    bundle: NeuronBundle, width: int, *, seed: int, statistics: Sequence[FFNStatistics] | None = None
) -> Reduction:
    """The FFN behind two projections, multiplied out: N neurons, as before, whose parameters are those of `width`.

    Gate and up share the projection of the inputs: its rank r has `r (2 N + d) <= 2 width d`. The rank of the outputs,
    less their bias, is that of :func:`mlp_fusion.methods.svd.rank_for`.
    """
    assert statistics is not None
    plain = bundle.parameterized("folded")
    return Reduction.plain(NeuronBundle.stack([_sliced(plain.select(n), width, s) for n, s in enumerate(statistics)]))


def _sliced(plain: NeuronBundle, width: int, statistics: FFNStatistics) -> NeuronBundle:
    _, N, d = plain.w_in.shape
    matrices = 1 if plain.w_gate is None else 2
    inputs = _projection(statistics.input_moment[:d, :d], rank_for(matrices * width, matrices * N, d))
    outputs = statistics.y.double()
    if plain.b_out is not None:
        outputs = outputs - plain.b_out[0].double()
    behind = _projection(outputs.T @ outputs, rank_for(width, N, plain.w_out.shape[2]))
    return dataclasses.replace(
        plain,
        w_in=_times(plain.w_in, inputs),
        w_gate=None if plain.w_gate is None else _times(plain.w_gate, inputs),
        w_out=_times(plain.w_out, behind),
    )


def _projection(moment: Tensor, rank: int) -> Tensor:
    """`(d, d)` float64: onto the `rank` eigenvectors of `moment (d, d)` with the greatest eigenvalues."""
    leading = torch.linalg.eigh(moment.double()).eigenvectors[:, -rank:]
    return leading @ leading.T


def _times(weight: Tensor, projection: Tensor) -> Tensor:
    return (weight.double() @ projection).to(weight.dtype)
