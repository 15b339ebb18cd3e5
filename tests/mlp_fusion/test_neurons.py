"""`NeuronBundle`: its function against a naive one, and the properties that every layout must have."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from ffn_blocks import ACTIVATIONS
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bundles import bundles, random_bundle, tie
from mlp_fusion.neurons import NeuronBundle, all_finite


def naive_forward(bundle: NeuronBundle, x: Tensor) -> Tensor:
    """Neuron by neuron, for a bundle whose scale is explicit."""
    y = torch.zeros(bundle.batch, x.shape[0], bundle.w_out.shape[2], dtype=x.dtype)
    for b in range(bundle.batch):
        if bundle.b_out is not None:
            y[b] += bundle.b_out[b]
        for j in range(bundle.width):
            z = x @ bundle.w_in[b, j] + (0 if bundle.b_in is None else bundle.b_in[b, j])
            if bundle.w_gate is None:
                hidden = ACTIVATIONS[bundle.activation](z)
            else:
                gate = x @ bundle.w_gate[b, j] + (0 if bundle.b_gate is None else bundle.b_gate[b, j])
                hidden = ACTIVATIONS[bundle.activation](gate) * z
            p = 1.0 if bundle.scale is None else bundle.scale[b, j]
            y[b] += torch.outer(hidden * p, bundle.w_out[b, j])
    return y


def _inputs(bundle: NeuronBundle, rows: int = 7) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(rows, bundle.w_in.shape[2], generator=g, dtype=bundle.w_in.dtype)


@given(bundles())
def test_forward_is_the_sum_over_neurons(bundle: NeuronBundle) -> None:
    x = _inputs(bundle)
    torch.testing.assert_close(bundle.forward(x), naive_forward(bundle, x), rtol=1e-10, atol=1e-10)


@given(bundles(scale=True), st.sampled_from(["scaled", "split", "folded"]))
def test_every_parameterization_is_the_same_function(bundle: NeuronBundle, parameterization: str) -> None:
    x = _inputs(bundle)
    other = bundle.parameterized(parameterization)
    assert (other.scale is None) == (parameterization == "folded")
    torch.testing.assert_close(other.forward(x), bundle.forward(x), rtol=1e-9, atol=1e-9)
    if parameterization == "split":
        assert not torch.equal(other.w_in, bundle.w_in) or bool((bundle.scale == 1).all())


@given(bundles(scale=True))
def test_split_stores_root_p_times_the_weights(bundle: NeuronBundle) -> None:
    split = bundle.parameterized("split")
    root = bundle.scale.sqrt() if bundle.scale is not None else torch.zeros(())
    torch.testing.assert_close(split.w_in, bundle.w_in * root.unsqueeze(-1))
    torch.testing.assert_close(split.w_out, bundle.w_out * root.unsqueeze(-1))
    torch.testing.assert_close(split.canonical().w_in, bundle.w_in)


@given(bundles(scale=True))
def test_unfolding_undoes_folding(bundle: NeuronBundle) -> None:
    assert bundle.scale is not None
    again = bundle.parameterized("folded").unfolded(bundle.scale)
    torch.testing.assert_close(again.w_out, bundle.w_out)
    torch.testing.assert_close(again.forward(_inputs(bundle)), bundle.forward(_inputs(bundle)))


@given(bundles())
def test_vectors_round_trip(bundle: NeuronBundle) -> None:
    again = bundle.with_vectors(bundle.vectors(), bundle.scale)
    for name in ("w_in", "w_gate", "b_in", "b_gate", "w_out", "b_out"):
        before, after = getattr(bundle, name), getattr(again, name)
        assert (before is None) == (after is None)
        assert before is None or torch.equal(before, after)


@given(bundles())
def test_vectors_hold_each_neuron_in_its_row(bundle: NeuronBundle) -> None:
    row = bundle.vectors()[0, -1]
    pieces = [bundle.w_gate, bundle.w_in, bundle.b_gate, bundle.b_in, bundle.w_out]
    expected = torch.cat([t[0, -1].reshape(-1) for t in pieces if t is not None])
    assert torch.equal(row, expected)


@given(bundles(scale=True))
def test_vectors_do_not_depend_on_the_parameterization(bundle: NeuronBundle) -> None:
    torch.testing.assert_close(bundle.parameterized("split").vectors(), bundle.vectors())


@given(bundles(), st.integers(0, 2**16))
def test_the_order_of_neurons_does_not_matter(bundle: NeuronBundle, seed: int) -> None:
    order = torch.randperm(bundle.width, generator=torch.Generator().manual_seed(seed))
    scale = None if bundle.scale is None else bundle.scale[:, order]
    shuffled = bundle.with_vectors(bundle.vectors()[:, order], scale)
    torch.testing.assert_close(shuffled.forward(_inputs(bundle)), bundle.forward(_inputs(bundle)), rtol=1e-9, atol=1e-9)


@given(bundles())
def test_singletons_change_nothing(bundle: NeuronBundle) -> None:
    labels = torch.arange(bundle.width).expand(bundle.batch, -1)
    reduced = bundle.reduce(labels)
    torch.testing.assert_close(reduced.forward(_inputs(bundle)), bundle.forward(_inputs(bundle)))


@given(bundles(scale=False), st.data())
def test_fusing_tied_neurons_is_exact(bundle: NeuronBundle, data: st.DataObject) -> None:
    sizes = torch.tensor(data.draw(st.lists(st.integers(1, 4), min_size=bundle.width, max_size=bundle.width)))
    tied = tie(bundle, sizes)
    labels = torch.arange(bundle.width).repeat_interleave(sizes).expand(bundle.batch, -1)
    fused = tied.reduce(labels)
    assert fused.scale is not None
    assert torch.equal(fused.scale, sizes.to(fused.scale.dtype).expand(bundle.batch, -1))
    torch.testing.assert_close(fused.forward(_inputs(bundle)), tied.forward(_inputs(bundle)), rtol=1e-9, atol=1e-9)


def test_reduce_has_the_same_bits_whatever_the_strides() -> None:
    g = torch.Generator().manual_seed(0)
    w_in, w_out = torch.randn(2, 60, 33, generator=g), torch.randn(2, 60, 33, generator=g)
    labels = torch.randint(20, (2, 60), generator=g)
    weights = torch.rand(2, 60, generator=g)
    bundle = NeuronBundle(w_in=w_in, w_out=w_out, activation="silu")
    turned = dataclasses.replace(bundle, w_out=w_out.transpose(1, 2).contiguous().transpose(1, 2))
    expected = bundle.reduce(labels, weights, 20)
    assert torch.equal(turned.reduce(labels, weights, 20).w_out, expected.w_out)
    assert torch.equal(bundle.select(1).reduce(labels[1:], weights[1:], 20).w_out[0], expected.w_out[1])


@given(bundles(), st.data())
def test_reduce_is_the_weighted_mean_per_cluster(bundle: NeuronBundle, data: st.DataObject) -> None:
    K = data.draw(st.integers(1, 5))
    seed = data.draw(st.integers(0, 2**16))
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, K, (bundle.batch, bundle.width), generator=g)
    weights = torch.rand(bundle.batch, bundle.width, generator=g, dtype=torch.float64) + 0.1
    reduced = bundle.reduce(labels, weights, n_clusters=K)
    sizes = torch.ones_like(weights) if bundle.scale is None else bundle.scale
    for b in range(bundle.batch):
        for k in range(K):
            members = labels[b] == k
            assert reduced.scale is not None
            torch.testing.assert_close(reduced.scale[b, k], sizes[b, members].sum())
            mass = (weights * sizes)[b, members]
            expected = (mass.unsqueeze(1) * bundle.vectors()[b, members]).sum(0) / mass.sum().clamp(min=1e-300)
            torch.testing.assert_close(reduced.vectors()[b, k], expected)


def test_an_empty_cluster_is_silent_in_every_parameterization() -> None:
    bundle = random_bundle(width=6)
    reduced = bundle.reduce(torch.tensor([[0, 0, 2, 2, 3, 3]]), n_clusters=5)
    assert reduced.scale is not None
    assert reduced.scale.tolist() == [[2.0, 0.0, 2.0, 2.0, 0.0]]
    x = _inputs(bundle)
    for parameterization in ("scaled", "split", "folded"):
        y = reduced.parameterized(parameterization).forward(x)
        torch.testing.assert_close(y, reduced.forward(x))


def test_stack_and_select() -> None:
    parts = [random_bundle(seed=s, scale=True) for s in range(3)]
    stacked = NeuronBundle.stack(parts)
    assert stacked.batch == 3
    for n, part in enumerate(parts):
        assert torch.equal(stacked.select(n).vectors(), part.vectors())
        assert torch.equal(stacked.select(n).forward(_inputs(part)), part.forward(_inputs(part)))
    with pytest.raises(ValueError, match="cannot be stacked"):
        NeuronBundle.stack([parts[0], random_bundle(scale=False)])
    with pytest.raises(ValueError, match="no bundles"):
        NeuronBundle.stack([])
    for beyond in (3, 7, -1):
        with pytest.raises(IndexError, match=f"problem {beyond} of a bundle of 3"):
            stacked.select(beyond)


def test_the_scale_stays_float32_in_a_half_precision_bundle() -> None:
    bundle = dataclasses.replace(random_bundle(), scale=torch.full((1, 6), 511.0, dtype=torch.float64))
    half = bundle.to(dtype=torch.bfloat16)
    assert half.w_in.dtype == torch.bfloat16
    assert half.scale is not None
    assert half.scale.dtype == torch.float32
    assert half.scale[0, 0] == 511
    assert half.forward(_inputs(half)).dtype == torch.bfloat16


_W = torch.randn(1, 6, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w_in": _W[0]}, r"w_in must be \(B, neurons, d\) and w_out \(B, neurons, outputs\), got \(6, 5\)"),
        ({"w_out": torch.randn(1, 7, 4)}, r"w_out must be \(1, 6, 4\) to fit w_in and w_out, got \(1, 7, 4\)"),
        ({"w_gate": torch.randn(1, 6, 4)}, r"w_gate must be \(1, 6, 5\)"),
        ({"b_in": torch.randn(6)}, r"b_in must be \(1, 6\)"),
        ({"b_out": torch.randn(1, 6)}, r"b_out must be \(1, 4\)"),
        ({"scale": torch.ones(1, 5)}, r"scale must be \(1, 6\)"),
        ({"b_gate": torch.ones(1, 6)}, "b_gate is there without w_gate"),
        ({"activation": "tanh"}, "unknown activation 'tanh'"),
    ],
)
def test_bad_bundles_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeuronBundle(**{"w_in": _W, "w_out": torch.randn(1, 6, 4), "activation": "gelu", **changes})


def test_bad_calls_are_named() -> None:
    bundle = random_bundle(scale=True)
    with pytest.raises(ValueError, match="unknown parameterization 'explicit'"):
        bundle.parameterized("explicit")
    with pytest.raises(ValueError, match="has a scale already"):
        bundle.unfolded(torch.ones(1, 6))
    with pytest.raises(ValueError, match=r"labels have shape \(1, 5\)"):
        bundle.reduce(torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels have shape \(1, 7\)"):
        bundle.reduce(torch.zeros(1, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels lie in \[0, 9\], expected \[0, 3\)"):
        bundle.reduce(torch.tensor([[0, 1, 2, 9, 0, 0]]), n_clusters=3)
    negative = dataclasses.replace(random_bundle(), scale=torch.full((1, 6), -2.0))
    torch.testing.assert_close(negative.parameterized("scaled").w_out, negative.w_out, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"labels lie in \[0, 3\], expected \[0, 3\)"):
        bundle.reduce(torch.tensor([[0, 1, 2, 3, 0, 0]]), n_clusters=3)
    with pytest.raises(ValueError, match=r"labels lie in \[-1"):
        bundle.reduce(torch.tensor([[-1, 1, 2, 3, 0, 0]]))
    with pytest.raises(ValueError, match="weights have shape"):
        bundle.reduce(torch.zeros(1, 6, dtype=torch.int64), torch.ones(1, 5))
    with pytest.raises(ValueError, match="rows have shape"):
        bundle.with_vectors(torch.zeros(1, 3, 2), None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_all_finite(value: float | None, dtype: torch.dtype) -> None:
    for place in (0, 500, 1022):
        tensor = torch.linspace(-3, 3, 1023).to(dtype).reshape(33, 31)
        if value is not None:
            tensor.view(-1)[place] = value
        assert all_finite(tensor) is (value is None)
    assert all_finite(torch.empty(0, 3, dtype=dtype))
