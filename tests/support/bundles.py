"""Random bundles of neurons for the tests, and hypothesis strategies over their layouts."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fusion_kernels.activations import ACTIVATIONS
from mlp_fusion.calibration import FFNStatistics
from mlp_fusion.neurons import NeuronBundle


def random_bundle(
    batch: int = 1,
    width: int = 6,
    d: int = 5,
    d_out: int = 4,
    *,
    gated: bool = False,
    bias: bool = True,
    scale: bool = False,
    activation: str = "gelu",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> NeuronBundle:
    """A bundle of normally distributed weights; integer cluster sizes from 1 to 5 when it has a scale."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return NeuronBundle(
        w_in=draw(batch, width, d),
        w_out=draw(batch, width, d_out),
        activation=activation,
        w_gate=draw(batch, width, d) if gated else None,
        b_in=draw(batch, width) if bias else None,
        b_gate=draw(batch, width) if bias and gated else None,
        b_out=draw(batch, d_out) if bias else None,
        scale=torch.randint(1, 6, (batch, width), generator=g).to(dtype) if scale else None,
    )


def tie(bundle: NeuronBundle, sizes: Tensor) -> NeuronBundle:
    """Every neuron j of a bundle without a scale repeated `sizes[j]` times."""
    repeated: dict[str, Any] = {
        name: tensor.repeat_interleave(sizes, dim=1)
        for name in ("w_in", "w_gate", "b_in", "b_gate", "w_out")
        if (tensor := getattr(bundle, name)) is not None
    }
    return dataclasses.replace(bundle, **repeated)


def statistics_of(bundle: NeuronBundle, x: Tensor, sequences: int = 20) -> FFNStatistics:
    """Calibration statistics of one FFN (B = 1) on the rows `x`, the naive way, as if from `sequences` sequences."""
    ones = torch.cat([x, torch.ones_like(x[:, :1])], dim=1).double()
    hidden = bundle.hidden(x)[0].double()
    return FFNStatistics(
        tokens=len(x),
        input_moment=ones.T @ ones / len(x),
        hidden_mean=hidden.mean(0),
        hidden_variance=hidden.var(0, correction=0),
        x=x,
        y=bundle.forward(x)[0],
        sequence=torch.arange(len(x)) * sequences // max(1, len(x)),
    )


@st.composite
def bundles(draw: st.DrawFn, *, scale: bool | None = None) -> NeuronBundle:
    """Bundles over batch sizes, odd shapes, gates, biases, scales and activations."""
    return random_bundle(
        batch=draw(st.integers(1, 3)),
        width=draw(st.integers(1, 17)),
        d=draw(st.integers(1, 9)),
        d_out=draw(st.integers(1, 9)),
        gated=draw(st.booleans()),
        bias=draw(st.booleans()),
        scale=draw(st.booleans()) if scale is None else scale,
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        seed=draw(st.integers(0, 2**16)),
    )
