"""`fused_mlp` and `fused_glu_mlp` against ordinary layers in float64: values, gradients, and what is kept for them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from blocks import BACKENDS, DTYPES, check, make_block
from hypothesis import given
from hypothesis import strategies as st
from rounding import assert_rounding
from torch import Tensor

from fusion_kernels import fused_glu_mlp, fused_mlp, native, split_gate_up
from fusion_kernels.activations import ACTIVATIONS
from fusion_kernels.gates import PLAIN
from fusion_kernels.mlp.operators import MLP


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients(activation: str, gated: bool, dtype: torch.dtype, backend: str) -> None:
    check(make_block(37, gated=gated, activation=activation, d=40, h=35, d_out=33), backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("scale", [None, "int", "float", "both"])
def test_optional_tensors(scale: str | None, bias: bool, gated: bool, backend: str) -> None:
    check(make_block(8, 5, gated=gated, bias=bias, scale=scale), backend, torch.float32, [1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_scale_before_the_activation(activation: str, gated: bool, dtype: torch.dtype, backend: str) -> None:
    check(make_block(70, gated=gated, activation=activation, d=40, h=35, d_out=33, scale="both"), backend, dtype)


def test_an_integer_scale_is_not_rounded_to_low_precision() -> None:
    one = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    x = torch.full((40, 1), 1 + 2.0**-7, dtype=torch.bfloat16)
    # 257 is 256 in bfloat16, and 257 x is 260 after one rounding.
    for scale, rows in itertools.product((torch.tensor([257]), torch.tensor([[257], [1]])), (1, 40)):
        y = fused_mlp(x[:rows], one, None, one, None, scale, "relu")
        assert y.tolist() == [[260.0]] * rows


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(
    ("tokens", "d", "h", "d_out"), [(1, 17, 23, 5), (17, 123, 1, 3), (1537, 5, 17, 4), (3, 17, 1537, 1)]
)
def test_odd_shapes(tokens: int, d: int, h: int, d_out: int, gated: bool, backend: str) -> None:
    check(make_block(tokens, d=d, h=h, d_out=d_out, gated=gated), backend, torch.float32)


@pytest.mark.skipif(native.UNAVAILABLE is not None, reason="the compiled library is not there")
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 20, 21])
def test_few_tokens_without_gradients(tokens: int, gated: bool) -> None:
    """Products by dot products, over sizes that leave rests of every kind, and by a BLAS where columns lie apart."""
    for bias, d, h in ((True, 523, 61), (False, 5, 12)):
        # Many tokens, a few at a time, so that torch's error is not that of a handful of entries.
        block = make_block(50, d=d, h=h, d_out=13, gated=gated, bias=bias).to(torch.float32)
        exact, peer, bound = block.to(torch.float64).eager(), block.eager(), block.bounds(torch.float32)["y"]
        spread = block.x.new_full((50, 2 * d), torch.nan)
        spread[:, :d] = block.x
        columns = block.w_in.t().contiguous().t()
        for case in (block, replace(block, x=spread[:, :d]), replace(block, w_in=columns)):
            with torch.no_grad():
                y = torch.cat([replace(case, x=x).fused(1, "cpu") for x in case.x.split(tokens)])
            assert_rounding({"y": y}, {"y": exact}, {"y": bound}, {"y": peer})


@pytest.mark.skipif(native.UNAVAILABLE is not None, reason="the compiled library is not there")
def test_a_token_has_the_same_bits_alone_and_among_few() -> None:
    block = make_block(20, d=523, h=61, d_out=130, gated=True, activation="silu").to(torch.float32)
    before = torch.get_num_threads()
    with torch.no_grad():
        y = block.fused(1, "cpu")
        for token in range(20):
            one = replace(block, x=block.x[token : token + 1])
            torch.testing.assert_close(one.fused(1, "cpu")[0], y[token], rtol=0, atol=0)
        try:
            torch.set_num_threads(2)
            torch.testing.assert_close(block.fused(1, "cpu"), y, rtol=0, atol=0)
        finally:
            torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_more_tokens_than_a_chunk(gated: bool, dtype: torch.dtype) -> None:
    for scale in ("float", "both"):
        check(make_block(1100, d=8, h=1030, d_out=6, gated=gated, scale=scale), "auto", dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [((0,), {}), ((2, 0, 3), {}), ((), {}), ((4,), {"d": 0}), ((4,), {"h": 0}), ((4,), {"d_out": 0}), ((0,), {"h": 0})],
)
def test_empty_and_degenerate(shape: tuple[int, ...], sizes: dict[str, int], gated: bool, backend: str) -> None:
    for level, scale in ((0, "float"), (1, "float"), (2, "float"), (1, "both")):
        block = make_block(*shape, gated=gated, scale=scale, **sizes).training()
        y, expected = block.fused(level, backend), block.eager()
        torch.testing.assert_close(y, expected)
        found, ideal = block.gradients(y), block.gradients(expected)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, ideal[name], msg=lambda m, name=name: f"{name}: {m}")


@given(
    tokens=st.integers(0, 70),
    d=st.integers(1, 40),
    h=st.integers(1, 40),
    d_out=st.integers(1, 40),
    gated=st.booleans(),
    bias=st.booleans(),
    scale=st.sampled_from([None, "int", "float", "both"]),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    level=st.integers(0, 2),
    seed=st.integers(0, 9),
)
def test_any_shape(level: int, tokens: int, **options: Any) -> None:
    block = make_block(tokens, **options).training()
    y, expected = block.fused(level), block.eager()
    torch.testing.assert_close(y, expected)
    found, ideal = block.gradients(y), block.gradients(expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, ideal[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_strided_inputs_and_expanded_gradients(gated: bool, backend: str) -> None:
    block = make_block(6, 8, gated=gated)
    plain = make_block(6, 8, gated=gated).training()
    block.x = block.x.mT.contiguous().mT
    block.w_in = block.w_in.mT.contiguous().mT
    block.w_out = torch.cat([block.w_out, block.w_out])[: block.w_out.shape[0]].mT.contiguous().mT
    wide = torch.randn(9, 2, dtype=torch.float64)
    wide[:, 0] = block.b_in
    block.b_in = wide[:, 0]
    block.training()
    for dy in (
        torch.ones((), dtype=torch.float64).expand(6, 8, 7),
        torch.randn(7, 8, 6, dtype=torch.float64).permute(2, 1, 0),
    ):
        block.dy = plain.dy = dy
        found, ideal = block.gradients(block.fused(1, backend)), plain.gradients(plain.eager())
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, ideal[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("scale", ["float", "both"])
def test_frozen_tensors_have_no_gradient_and_change_no_other(scale: str, level: int, gated: bool, backend: str) -> None:
    block = make_block(5, gated=gated, scale=scale).training()
    full = block.gradients(block.eager())
    for name in full:
        for frozen in (set(full) - {name}, {name}):
            for other, t in block.leaves().items():
                t.requires_grad_(other not in frozen)
            found = block.gradients(block.fused(level, backend))
            assert set(found) == set(full) - frozen
            for other, gradient in found.items():
                torch.testing.assert_close(gradient, full[other])


def test_frozen_tensors_return_nothing_from_the_operator() -> None:
    block = make_block(5, h=9)
    inputs = (block.x, block.w_in, block.w_out.mT, None, None, None, None, None)
    _, z, g, a = MLP.forward_operator.overload(*inputs, "gelu", *PLAIN.arguments, 1, "auto")
    assert g.numel() == a.numel() == 0
    needs = [False, True, False, False, False, False, False, False]
    out = MLP.backward_operator.overload(block.dy, *inputs, z, g, a, "gelu", *PLAIN.arguments, 1, "auto", needs)
    assert [t.numel() for t in out] == [0, 9 * 12, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
def test_gate_and_up_in_one_tensor(layout: str) -> None:
    block = make_block(5, gated=True)
    assert block.w_gate is not None
    assert block.b_gate is not None
    assert block.b_in is not None
    stack = (
        (lambda a, b: torch.cat([a, b]))
        if layout == "concatenated"
        else (lambda a, b: torch.stack([a, b], 1).flatten(0, 1))
    )
    weight = stack(block.w_gate, block.w_in).requires_grad_()
    bias = stack(block.b_gate, block.b_in).requires_grad_()
    (w_gate, w_up), (b_gate, b_up) = split_gate_up(weight, layout), split_gate_up(bias, layout)
    assert (
        w_gate.untyped_storage().data_ptr() == w_up.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    )
    y = fused_glu_mlp(block.x, w_gate, w_up, block.w_out, b_gate, b_up, block.b_out, block.scale, "gelu")
    dw, db = torch.autograd.grad(y, (weight, bias), block.dy)
    ideal = block.training().gradients(block.eager())
    torch.testing.assert_close(y, block.eager())
    torch.testing.assert_close(dw, stack(ideal["w_gate"], ideal["w_in"]))
    torch.testing.assert_close(db, stack(ideal["b_gate"], ideal["b_in"]))


def test_split_gate_up_names_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="even number of rows"):
        split_gate_up(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="unknown layout 'stacked': use concatenated or interleaved"):
        split_gate_up(torch.zeros(4, 4), "stacked")


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_same_bits_again(level: int, gated: bool) -> None:
    block = make_block(300, d=31, h=1100, gated=gated, dtype=torch.float32).training()
    y = block.fused(level)
    first, second = (
        dict(
            zip(
                block.leaves(),
                torch.autograd.grad(y, list(block.leaves().values()), block.dy, retain_graph=True),
                strict=True,
            )
        )
        for _ in range(2)
    )
    fresh = block.gradients(block.fused(level))
    for name in first:
        # The second backward of one graph sees the saved tensors as they were.
        assert torch.equal(first[name], second[name]), name
        assert torch.equal(first[name], fresh[name]), name


def saved_sizes(run: Any) -> list[int]:
    """Elements of the tensors that autograd packs while `run` runs."""
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sizes


@pytest.mark.parametrize("compiled", [False, True], ids=["direct", "operator"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_hidden_tensors_that_are_saved(gated: bool, compiled: bool) -> None:
    T, h = 41, 47
    block = make_block(T, h=h, d=5, d_out=3, gated=gated).training()

    def run(level: int) -> Tensor:
        if not compiled:
            return block.fused(level)
        order = (block.x, *block.ffn.tensors)
        y: Tensor = MLP.forward_operator.overload(*order, "gelu", *PLAIN.arguments, level, "auto")[0]
        return y

    hidden = {level: saved_sizes(lambda level=level: run(level)).count(T * h) for level in (0, 1, 2)}
    eager = saved_sizes(block.eager).count(T * h)
    assert hidden == ({0: 3, 1: 2, 2: 0} if gated else {0: 2, 1: 1, 2: 0})
    assert 2 * hidden[1] <= eager + gated  # eager: z, a, a p; gated: g, phi(g), z, phi(g) z, times p


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_nothing_is_saved_or_made_without_a_gradient(gated: bool) -> None:
    block = make_block(41, gated=gated).training()
    with torch.no_grad():
        assert saved_sizes(lambda: block.fused(0)) == []
        assert not block.fused(0).requires_grad
        y = block.fused(0)
    order = (block.x, *block.ffn.tensors)
    with torch.inference_mode():
        torch.testing.assert_close(block.fused(1), y)
    with torch.no_grad():
        assert [t.numel() for t in MLP.forward_operator.overload(*order, "gelu", *PLAIN.arguments, 2, "auto")[1:]] == [
            0,
            0,
            0,
        ]
    torch.testing.assert_close(y, block.eager().detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("scale", ["float", "both"])
def test_scale_zero_and_negative(scale: str, gated: bool, backend: str) -> None:
    block = make_block(33, gated=gated, scale=scale).training()
    assert block.scale is not None
    with torch.no_grad():
        block.scale[..., :4] = torch.tensor([0.0, -1.0, 0.0, 1e-30])
    found, ideal = block.gradients(block.fused(1, backend)), block.gradients(block.eager())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, ideal[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_that_are_not_finite_are_passed_on(activation: str, backend: str) -> None:
    one = torch.ones(1, 1)
    x = torch.tensor([float("nan"), 1e4, -1e4, 1e-30, 0.0, -200.0])[:, None]
    y = fused_mlp(x, one, None, one, None, activation=activation, backend=backend)
    torch.testing.assert_close(y, ACTIVATIONS[activation].function(x), equal_nan=True)


def test_a_large_range_of_pre_activations() -> None:
    x = torch.linspace(-30, 30, 4001, dtype=torch.float64)[:, None]
    one = torch.ones(1, 1, dtype=torch.float64)
    for activation in ACTIVATIONS:
        for dtype in (torch.float32, torch.float64):
            z = x.to(dtype).requires_grad_()
            y = fused_mlp(z, one.to(dtype), None, one.to(dtype), None, activation=activation)
            (dz,) = torch.autograd.grad(y.sum(), z)
            wide = z.detach().double()
            # Relative to the larger of 1 and the value: where torch's own formulas cancel, so may these.
            for found, exact in (
                (y, ACTIVATIONS[activation].function(wide)),
                (dz, ACTIVATIONS[activation].derivative(wide)),
            ):
                error = (found.detach().double() - exact).abs() / exact.abs().clamp(min=1)
                assert float(error.max()) <= 16 * torch.finfo(dtype).eps, (activation, dtype)
