"""Limits and offsets of gated blocks: every backend, every dtype, both ways, against ordinary layers in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ntk_rounding
import pytest
import torch
from blocks import BACKENDS, DTYPES, GATES, MLPCall, check, make_block
from ffn_blocks import KERNELS, Bundle, full_gram, jacobian_grams, make_bundle
from ntk_emulation import Emulation
from rounding import Arithmetic, assert_rounding
from torch import Tensor

from fusion_kernels import Gate, fused_experts, fused_mlp, native, ntk_compare, ntk_gram, ntk_vp
from fusion_kernels.experts.operators import EXPERTS
from fusion_kernels.ffn import FFN
from fusion_kernels.mlp.operators import MLP
from fusion_kernels.ntk import cuda_backend

#: Of tangent kernels.
NTK_BACKENDS = ["reference", *([] if native.UNAVAILABLE else ["cpu"])]
gates = pytest.mark.parametrize("gate", GATES)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def limited(*shape: int, gate: str = "above", activation: str = "quick_gelu", **options: Any) -> MLPCall:
    """A gated block whose limits bind on both sides."""
    return make_block(*shape, gated=True, activation=activation, gating=GATES[gate], spread=12.0, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@gates
def test_values_and_gradients(gate: str, dtype: torch.dtype, backend: str) -> None:
    for activation, scale in (("quick_gelu", "both"), ("silu", "float"), ("gelu", None)):
        check(limited(37, gate=gate, activation=activation, d=40, h=35, d_out=33, scale=scale), backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@gates
@pytest.mark.parametrize(("tokens", "d", "h", "d_out"), [(1, 17, 23, 5), (17, 123, 1, 3), (3, 17, 1537, 1)])
def test_odd_shapes(tokens: int, d: int, h: int, d_out: int, gate: str, backend: str) -> None:
    for scale in ("float", "both", None):
        check(limited(tokens, gate=gate, d=d, h=h, d_out=d_out, scale=scale), backend, torch.float32, [1])


@pytest.mark.skipif(native.UNAVAILABLE is not None, reason="no compiled library")
def test_a_limit_beyond_the_numbers_of_the_dtype_leaves_the_form_what_it_is() -> None:
    block = replace(limited(9, scale="both").to(torch.float16), gating=Gate(1e6, "above"))
    exact = block.to(torch.float64).eager()
    torch.testing.assert_close(block.fused(2, "cpu").double(), exact, rtol=0, atol=3e-3 * float(exact.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0,), (2, 0, 3), (4,)])
def test_nothing_to_compute(shape: tuple[int, ...], backend: str) -> None:
    block = limited(*shape, h=0 if shape == (4,) else 9).training()
    torch.testing.assert_close(block.fused(1, backend), block.eager())
    ideal = block.gradients(block.eager())
    for name, gradient in block.gradients(block.fused(1, backend)).items():
        torch.testing.assert_close(gradient, ideal[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", ["float", "both"])
@gates
def test_frozen_tensors_have_no_gradient_and_change_no_other(gate: str, scale: str, backend: str) -> None:
    block = limited(5, gate=gate, scale=scale).training()
    full = block.gradients(block.eager())
    for frozen in ({"scale"}, {"x", "w_out"}, *(set(full) - {name} for name in full)):
        for name, t in block.leaves().items():
            t.requires_grad_(name not in frozen)
        for level in (0, 1, 2):
            found = block.gradients(block.fused(level, backend))
            assert set(found) == set(full) - frozen
            for name, gradient in found.items():
                torch.testing.assert_close(gradient, full[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", [Gate(7.0, "above"), Gate(7.0, "both", 1.0), Gate(7.0, "after"), Gate(7.0)])
def test_at_a_limit_the_gradient_is_that_of_the_inside(gate: Gate, dtype: torch.dtype, backend: str) -> None:
    """As `torch.clamp` has it, on either side; and NaN stays NaN."""
    values = torch.tensor([-7.5, -7.0, -6.5, 0.0, 6.5, 7.0, 7.5, torch.nan], dtype=dtype)
    eye, none = torch.eye(1, dtype=dtype), None
    pairs = torch.cartesian_prod(values, values)
    for activation in ("relu", "silu"):
        block = MLPCall(
            pairs, torch.ones(64, 1, dtype=dtype), eye.new_tensor([[0, 1]]), eye, eye.new_tensor([[1, 0]]), none, none,
            none, none, activation, gate,
        )  # fmt: skip
        block.x = block.x[block.x.isfinite().all(1) | (pairs.isnan().all(1))]
        block.dy = block.dy[: len(block.x)]
        block = block.training()
        torch.testing.assert_close(block.fused(1, backend), block.eager(), equal_nan=True)
        finite = block.x.isfinite().all(1)
        ideal = block.gradients(block.eager())["x"][finite]
        near = {"rtol": 8 * torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps}
        torch.testing.assert_close(block.gradients(block.fused(1, backend))["x"][finite], ideal, **near)
        assert bool((ideal[:, 1][block.x[finite][:, 1].abs() == 7] != 0).any())


@pytest.mark.parametrize("scale", ["float", "both"])
@gates
def test_higher_derivatives_and_transforms(gate: str, scale: str) -> None:
    block = limited(5, gate=gate, d=3, h=4, d_out=2, scale=scale).training()

    def second(y: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(y, list(block.leaves().values()), block.dy, create_graph=True)
        inner = [block.x, block.w_in, block.w_out]
        return list(torch.autograd.grad(torch.stack([t.square().sum() for t in first]).sum(), inner))

    ideal = second(block.eager())
    for y in (block.fused(), block.fused(2, "torch"), direct(block)):
        for found, expected in zip(second(y), ideal, strict=True):
            torch.testing.assert_close(found, expected)
    x, tangent = block.x.detach(), torch.randn_like(block.x)
    fused = torch.func.jvp(lambda x: replace(block, x=x).fused(), (x,), (tangent,))
    eager = torch.func.jvp(lambda x: replace(block, x=x).eager(), (x,), (tangent,))
    torch.testing.assert_close(fused, eager)


def direct(block: MLPCall, level: int = 1) -> Tensor:
    """y of the dispatched operator."""
    y: Tensor = MLP.forward_operator.overload(block.x, *block.ffn.tensors, *block.ffn.function, level, "auto")[0]
    return y


@pytest.mark.slow
def test_opcheck_and_compiler() -> None:
    block = limited(5, scale="both").training()
    arguments = (block.x, *block.ffn.tensors)
    torch.library.opcheck(MLP.forward_operator.overload, (*arguments, *block.ffn.function, 1, "auto"))
    with torch.no_grad():
        kept = MLP.forward_operator.overload(*arguments, *block.ffn.function, 1, "auto")[1:]
    options = (*block.ffn.function, 1, "auto", [True] * 8)
    torch.library.opcheck(MLP.backward_operator.overload, (block.dy.requires_grad_(), *arguments, *kept, *options))
    compiled = torch.compile(lambda x: replace(block, x=x).fused(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(block.x), block.eager())


# --- experts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("level", [0, 1, 2])
@gates
def test_experts(gate: str, level: int, backend: str) -> None:
    """Expert by expert, the block above; `grouped_mm` has no float64."""
    dtype, tolerance = (torch.float64, 1e-10) if backend == "loop" else (torch.float32, 1e-4)
    experts = [limited(23, gate=gate, d=8, h=12, d_out=4, seed=e).to(dtype) for e in range(3)]
    names = ("w_in", "w_out", "w_gate", "b_in", "b_gate", "b_out", "scale")
    stacked = {name: torch.stack([getattr(e, name) for e in experts]).requires_grad_() for name in names}
    x, dy = experts[0].x.requires_grad_(), experts[0].dy
    index, weights = torch.rand(23, 3).topk(2).indices, torch.rand(23, 2).to(dtype).requires_grad_()
    y = fused_experts(
        x, index, weights, activation="quick_gelu", gating=GATES[gate], checkpoint_level=level, backend=backend,
        **stacked,
    )  # fmt: skip
    share = torch.zeros(23, 3, dtype=dtype).scatter(1, index, weights)
    blocks = [replace(b, x=x, **{name: t[e] for name, t in stacked.items()}) for e, b in enumerate(experts)]
    expected = torch.stack([share[:, e, None] * b.eager() for e, b in enumerate(blocks)]).sum(0)
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    leaves = [x, weights, *stacked.values()]
    for found, ideal in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(found, ideal, rtol=tolerance, atol=tolerance * float(ideal.abs().max()))


def test_experts_operator() -> None:
    block = limited(7, d=4, h=8, d_out=4, scale="float")
    tensors = [torch.stack([t, 2 * t]).requires_grad_() for t in block.ffn.tensors if t is not None]
    order, ends = torch.randperm(7), torch.tensor([3, 6], dtype=torch.int32)
    arguments = (block.x, order, ends, *tensors, *block.ffn.function, 1, "loop")
    torch.library.opcheck(EXPERTS.forward_operator.overload, arguments)


# --- tangent kernels --------------------------------------------------------------------------------------------------


def limited_bundle(gate: str, exponent: float = 0.5, activation: str = "quick_gelu") -> Bundle:
    return make_bundle(
        17, 13, 5, gated=True, scale=True, scale_exponent=exponent, activation=activation, gating=GATES[gate], spread=12
    )


@pytest.mark.parametrize("backend", NTK_BACKENDS)
@pytest.mark.parametrize("exponent", [0.0, 0.5, 0.3])
@gates
def test_tangent_kernels_are_those_of_jacobians(gate: str, exponent: float, backend: str) -> None:
    for activation in ("quick_gelu", "relu2"):
        bundle = limited_bundle(gate, exponent, activation)
        x1, x2 = torch.randn(7, 17).double(), torch.randn(5, 17).double()
        for kernel in KERNELS:
            for part, gram in jacobian_grams(bundle, x1, x2, kernel).items():
                found = ntk_gram(bundle, x1, x2, params=(part,), kernel=kernel, backend=backend)
                torch.testing.assert_close(found, gram, rtol=1e-9, atol=1e-9 * float(gram.abs().max()))


@pytest.mark.parametrize("backend", NTK_BACKENDS)
@gates
def test_tangent_kernels_in_low_precision_err_as_rounding_does(gate: str, backend: str) -> None:
    bundle = limited_bundle(gate).to(torch.float32)
    wide, x = bundle.to(torch.float64), torch.randn(37, 17)
    exact, bound = ntk_gram(wide, x.double()), ntk_rounding.gram(Arithmetic(torch.float32), wide, x, None)
    assert_rounding({"K": ntk_gram(bundle, x, backend=backend)}, {"K": exact}, {"K": bound})


@gates
def test_tangent_kernels_on_gpus(gate: str, emulation: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    """`csrc/cuda/operand.h`, compiled for the host."""
    monkeypatch.setattr(native, "cuda_operators", lambda: emulation)
    bundle, x = limited_bundle(gate).at(0), torch.randn(7, 17).double()
    parts = ["w_in", "w_out", "w_gate", "b_in", "b_gate", "b_out"]
    torch.testing.assert_close(
        cuda_backend.ntk_gram(x, None, bundle, parts, "gd"), ntk_gram(limited_bundle_of(bundle), x, backend="reference")
    )


def limited_bundle_of(ffn: FFN) -> Bundle:
    """The block with a batch axis again."""
    tensors = [None if t is None else t[None] for t in ffn.tensors]
    return Bundle.of(tensors, ffn.activation, ffn.scale_exponent, ffn.gating)


@gates
def test_products_with_tangent_kernels_and_comparisons(gate: str) -> None:
    bundle, x, v = limited_bundle(gate), torch.randn(7, 17).double(), torch.randn(7, 5).double()
    k = full_gram(bundle, x, x, "gd").transpose(1, 2).reshape(35, 35)
    for backend in ("torch", "reference"):
        torch.testing.assert_close(ntk_vp(bundle, x, v, backend=backend), (k @ v.reshape(35)).view(7, 5))
    other = limited_bundle(gate)
    kernels = [ntk_gram(b, x) for b in (bundle, other)]
    found = ntk_compare(bundle, other, x)
    distance = (kernels[0] - kernels[1]).norm() / kernels[0].norm()
    assert found.relative_error == pytest.approx(float(distance))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": 0.0}, "limit must be positive and finite, or None for no limit, got 0.0"),
        ({"limit": -7.0}, "limit must be positive"),
        ({"limit": float("nan")}, "limit must be positive"),
        ({"limit": float("inf")}, "limit must be positive"),
        ({"limit": 7.0, "clamp": "below"}, "unknown clamp 'below': use one of none, above, both, after"),
        ({"clamp": "above"}, "clamp 'above' needs a limit"),
        ({"up_offset": float("nan")}, "up_offset must be finite"),
    ],
)
def test_gates_that_there_are_not(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gate(**arguments)


def test_a_plain_block_has_no_gate() -> None:
    block = limited(5, bias=False)
    w_in, w_out = torch.randn(2, 9, 12), torch.randn(2, 7, 9)
    with pytest.raises(ValueError, match="gating has limits or an offset, and there is no w_gate"):
        fused_experts(torch.randn(4, 12), torch.zeros(4, 1).long(), torch.ones(4, 1), w_in, w_out, gating=block.gating)
    with pytest.raises(ValueError, match="there is no w_gate: a plain block has no gate"):
        replace(block.ffn, w_gate=None).check()
    with pytest.raises(TypeError, match="gating"):
        fused_mlp(block.x, block.w_in, None, block.w_out, None, gating=block.gating)  # type: ignore[call-arg]
