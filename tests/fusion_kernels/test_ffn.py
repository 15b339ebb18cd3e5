"""`FFN`: one order and one way round, wherever a block's tensors go."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fusion_kernels import fused_experts, fused_glu_mlp, fused_mlp, native
from fusion_kernels.ffn import FFN, PARTS, SCHEMA, TENSORS
from fusion_kernels.mlp.types import Gradients, Needs
from fusion_kernels.ntk.types import Block

FULL = {
    "w_in": (6, 5), "w_out": (6, 4), "w_gate": (6, 5), "b_in": (6,), "b_gate": (6,), "b_out": (4,), "scale": (6,),
}  # fmt: skip


def full(*axes: int, **changes: Tensor | None) -> FFN:
    """A gated block with all that there can be."""
    tensors = {name: torch.randn(*axes, *shape) for name, shape in FULL.items()}
    return FFN(**{**tensors, **changes}, activation="silu")  # type: ignore[arg-type]


def test_the_order_is_that_of_the_fields() -> None:
    ffn = full()
    assert tuple(FULL) == TENSORS == (*PARTS, "scale")
    assert list(ffn.named()) == list(ffn.shapes()) == list(TENSORS)
    assert all(t is getattr(ffn, name) for name, t in zip(TENSORS, ffn.tensors, strict=True))
    again = FFN.of(ffn.tensors, "silu")
    assert all(getattr(again, field.name) is getattr(ffn, field.name) for field in dataclasses.fields(FFN)[:-1])


def test_gradients_and_needs_have_the_order() -> None:
    assert Needs._fields == Gradients._fields == ("x", *TENSORS)
    for bit, name in enumerate(Needs._fields):
        assert Needs(*(field == name for field in Needs._fields)).bits == 1 << bit


@pytest.mark.parametrize(
    "name",
    ["mlp", "mlp_backward", "experts", "experts_backward", "ntk_gram", "ntk_gram_out", "ntk_jvp", "ntk_vjp", "ntk_vp",
     "ntk_gradient_gram", "ntk_gradient_norms"],
)  # fmt: skip
def test_operators_take_the_tensors_in_that_order(name: str) -> None:
    assert SCHEMA in str(getattr(torch.ops.fusion_kernels, name).default._schema)


@pytest.mark.skipif(native.UNAVAILABLE is not None, reason="no compiled library")
@pytest.mark.parametrize("name", ["mlp", "mlp_output", "mlp_backward", "ntk_factors"])
def test_compiled_operators_take_the_tensors_in_that_order(name: str) -> None:
    taken = [a.name for a in getattr(native.operators(), name).default._schema.arguments if a.name in TENSORS]
    wanted = list(TENSORS) if name != "ntk_factors" else ["w_in", "w_gate", "b_in", "b_gate"]
    assert taken == wanted == [n for n in TENSORS if n in wanted]


@pytest.mark.parametrize("axes", [(), (3,), (2, 3)])
def test_shapes_that_fit(axes: tuple[int, ...]) -> None:
    names = ("A", "B")[: len(axes)]
    full(*axes).check(*names)
    FFN(torch.randn(*axes, 0, 5), torch.randn(*axes, 0, 4), "relu").check(*names)


@pytest.mark.parametrize("name", [n for n in TENSORS if n != "w_in"])
def test_a_tensor_that_does_not_fit_is_named(name: str) -> None:
    wrong = torch.randn(2, 7, *FULL[name][1:])
    message = rf"^{name} must be \(2, {FULL[name][0]}.*\) to fit w_in and w_out, got \(2, 7"
    with pytest.raises(ValueError, match=message):
        full(2, **{name: wrong}).check("B")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w_in": torch.randn(6, 5)}, r"w_in must be \(B, neurons, d\) and w_out \(B, .*, got \(6, 5\)"),
        ({"w_gate": None}, "b_gate is there without w_gate"),
    ],
)
def test_what_is_no_block_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        full(2, **changes).check("B")


def test_one_of_several_blocks() -> None:
    several = full(3, b_in=None)
    one = several.at(1)
    assert one.b_in is None
    assert all(torch.equal(t, getattr(several, name)[1]) for name, t in one.named().items())
    one.check()


def test_a_block_is_its_own_bundle() -> None:
    ffn = full(1)
    block: Block = ffn
    assert block.as_bundle() is ffn
    doubled = ffn.map(lambda t: 2 * t)
    assert torch.equal(doubled.w_out, 2 * ffn.w_out)
    assert (doubled.activation, type(doubled)) == ("silu", FFN)


def test_the_output_weight_of_a_linear_is_turned_without_a_copy() -> None:
    ffn = full()
    weight = ffn.w_out.mT.contiguous()
    again = FFN.of_linears((ffn.w_in, weight, *ffn.tensors[2:]), "silu")
    assert torch.equal(again.w_out, ffn.w_out)
    assert again.w_out.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_square_weights_are_taken_as_a_linear_has_them(gated: bool, backend: str) -> None:
    """No shape tells one way round from the other."""
    if backend == "cpu" and native.UNAVAILABLE is not None:
        pytest.skip("no compiled library")
    x, w_in, w_gate, w_out, dy = torch.randn(5, 6, 6, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, w_in, w_gate, w_out)]
    x, w_in, w_gate, w_out = leaves
    if gated:
        y = fused_glu_mlp(x, w_gate, w_in, w_out, backend=backend)
        expected = F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_in), w_out)
    else:
        y = fused_mlp(x, w_in, None, w_out, None, backend=backend)
        expected = F.linear(F.gelu(F.linear(x, w_in)), w_out)
        leaves.pop(2)
    torch.testing.assert_close(y, expected)
    gradients, ideal = (torch.autograd.grad(of, leaves, dy) for of in (y, expected))
    for found, wanted in zip(gradients, ideal, strict=True):
        torch.testing.assert_close(found, wanted)
        assert found.is_contiguous()


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_square_weights_of_experts_are_taken_as_a_linear_has_them(backend: str) -> None:
    x, w_in, w_out = torch.randn(4, 4), torch.randn(2, 4, 4), torch.randn(2, 4, 4, requires_grad=True)
    index, share, dy = torch.tensor([[0], [1], [1], [0]]), torch.ones(4, 1), torch.randn(4, 4)
    y = fused_experts(x, index, share, w_in, w_out, activation="relu", backend=backend)
    rows = [F.linear(F.relu(F.linear(row, w_in[e])), w_out[e]) for row, e in zip(x, index[:, 0].tolist(), strict=True)]
    expected = torch.stack(rows)
    torch.testing.assert_close(y, expected)
    (found,), (wanted,) = (torch.autograd.grad(of, w_out, dy) for of in (y, expected))
    torch.testing.assert_close(found, wanted)
    assert found.is_contiguous()
