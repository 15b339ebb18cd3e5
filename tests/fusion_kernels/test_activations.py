"""`fusion_kernels.activations` is the table: what computes activations elsewhere has its entries, and no others."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    import triton_interpreter  # noqa: F401 - before any kernel is defined

# isort: split
import blocks  # noqa: E402
import ffn_blocks  # noqa: E402
import rounding  # noqa: E402
import torch  # noqa: E402
from ntk_emulation import Emulation  # noqa: E402
from torch import Tensor  # noqa: E402

from fusion_kernels import fused_mlp, native  # noqa: E402
from fusion_kernels.activations import ACTIVATIONS, get_activation  # noqa: E402
from fusion_kernels.gates import PLAIN  # noqa: E402
from fusion_kernels.mlp import torch_backend  # noqa: E402

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
NAMES = list(ACTIVATIONS)

#: (z, activation) -> its values and its derivatives at the values of z (n,).
Evaluate = Callable[[Tensor, str], tuple[Tensor, Tensor]]


def compiled_block(z: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """`csrc/cpu/mlp_pointwise_body.h`: neurons of one input, which is 1, with the values as weights."""
    one, w_in, w_out = z.new_ones(1, 1), z[:, None], z.new_ones(len(z), 1)
    ffn = (w_in, w_out, None, None, None, None, None)
    _, pre, gate, a = native.operators().mlp(one, *ffn, activation, *PLAIN.arguments, 0)
    bias = (w_in, w_out, None, torch.zeros_like(z), None, None, None)
    found = native.operators().mlp_backward(one, one, *bias, pre, gate, a, activation, *PLAIN.arguments, 1 << 4)
    return a[0], found[4].to(z.dtype)


def compiled_factors(z: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """`csrc/cpu/ntk_factors.cpp`."""
    ones = torch.ones_like(z)
    none = (None, None, None, None)
    hidden, slopes = native.operators().ntk_factors(
        z.new_ones(1, 1), z[:, None].contiguous(), *none, ones, ones, None, activation, *PLAIN.arguments, False
    )
    return hidden[0], slopes[0]


def by_torch(z: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """`fusion_kernels/mlp/torch_backend.py`, whose derivatives are torch's own kernels."""
    slope = torch_backend.act_backward(torch.ones_like(z), z, activation)
    return ACTIVATIONS[activation].function(z), slope


def by_triton(z: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """`fusion_kernels/mlp/_triton_tiles.py`, interpreted."""
    from fusion_kernels.mlp import triton_pointwise

    value = triton_pointwise.act_forward(z[None], activation)
    slope, again = triton_pointwise.act_backward(torch.ones_like(z)[None], z[None], activation, True)
    assert again is not None
    assert torch.equal(again, value) or value.isnan().any()
    return value[0], slope[0]


def table(z: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The table itself, in the dtype."""
    return ACTIVATIONS[activation].function(z), ACTIVATIONS[activation].derivative(z)


class Place(NamedTuple):
    """Where activations are computed, and in which dtypes."""

    evaluate: Evaluate
    dtypes: tuple[torch.dtype, ...]


WIDE, ALL = (torch.float32, torch.float64), (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PLACES = {
    "table": Place(table, WIDE),
    "torch": Place(by_torch, ALL),
    "compiled block": Place(compiled_block, ALL),
    "compiled factors": Place(compiled_factors, WIDE),
    "triton": Place(by_triton, (torch.float32, torch.bfloat16, torch.float16)),
}
SKIPPED = {
    "compiled block": pytest.mark.skipif(native.UNAVAILABLE is not None, reason="no compiled library"),
    "compiled factors": pytest.mark.skipif(native.UNAVAILABLE is not None, reason="no compiled library"),
    "triton": needs_triton,
}


def grid(dtype: torch.dtype) -> Tensor:
    """Values dense around 0, both zeros, large and tiny ones, and infinities; more than a vector register holds."""
    tiny, large = torch.finfo(dtype).tiny, [30.0, 100.0, 1e4, 6e4]
    if dtype != torch.float16:
        large += [1e10, 1e15, 1e18]  # beyond, z * z is infinite in float32
    some = torch.tensor([0.0, tiny, 1e-4, *large, torch.inf], dtype=torch.float64)
    return torch.cat([torch.linspace(-12, 12, 193, dtype=torch.float64), some, -some]).to(dtype)


def assert_is_the_table(found: tuple[Tensor, Tensor], z: Tensor, activation: str) -> None:
    """Values and derivatives are those of the table in float64, up to the rounding of a short formula in the dtype.

    Where cancellation may leave the rounding of terms of the size of z, z is counted as 12 at most: beyond, the
    functions are 0, 1 or z. At infinities they are what the table has there, if it has anything in this dtype and in
    float64.
    """
    unit, tiny = torch.finfo(z.dtype).eps, torch.finfo(z.dtype).tiny
    for what, is_, exact, own in zip(
        ("value", "slope"), found, table(z.double(), activation), table(z, activation), strict=True
    ):
        assert is_.dtype == z.dtype
        expected = torch.where(z.isinf() & own.isnan(), torch.nan, exact.to(z.dtype).double())
        allowed = 8 * unit * (expected.abs() + z.double().abs().clamp(max=12.0)) + 8 * tiny
        near = (is_.double() - expected).abs() <= allowed
        wrong = (expected.isfinite() & ~near) | (expected.isinf() & (is_.double() != expected))
        rows = zip(z[wrong].tolist(), is_[wrong].tolist(), expected[wrong].tolist(), strict=True)
        assert not bool(wrong.any()), "; ".join(f"{what} at {at}: {one} for {other}" for at, one, other in rows)
        assert bool(expected[z.isfinite()].isnan().logical_not().all())


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize(
    ("place", "dtype"),
    [
        pytest.param(name, dtype, marks=SKIPPED.get(name, ()), id=f"{name}-{str(dtype)[6:]}")
        for name, place in PLACES.items()
        for dtype in place.dtypes
    ],
)
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # numpy's, at infinities
def test_values_and_derivatives(place: str, dtype: torch.dtype, activation: str) -> None:
    z = grid(dtype)
    assert_is_the_table(PLACES[place].evaluate(z, activation), z, activation)


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("dtype", WIDE)
def test_values_and_derivatives_on_a_gpu(emulation: Emulation, dtype: torch.dtype, activation: str) -> None:
    """`csrc/cuda/operand.h`, compiled for the host."""
    z, ones = grid(dtype)[None], torch.ones_like(grid(dtype))
    flags = {"signs": False, "inputs": False, "slopes_in": True, "slopes_gate": False, "hidden": True}
    operand = emulation.ntk_operand(
        z.new_ones(1, 1), z, None, None, ones, ones, None, activation, *PLAIN.arguments, **flags, precision="highest"
    )
    slope, value = operand[0, 0].chunk(2)
    assert_is_the_table((value[: len(ones)], slope[: len(ones)]), z[0], activation)


@pytest.mark.parametrize("activation", NAMES)
def test_far_from_zero_the_table_is_what_the_functions_tend_to(activation: str) -> None:
    far = torch.tensor([50.0, 1e4, 1e10], dtype=torch.float64)
    function, derivative = ACTIVATIONS[activation].function, ACTIVATIONS[activation].derivative
    power = 2.0 if activation == "relu2" else 1.0
    torch.testing.assert_close(function(far), far**power, rtol=1e-14, atol=0)
    torch.testing.assert_close(derivative(far), power * far ** (power - 1.0), rtol=1e-14, atol=0)
    for at in (function(-far), derivative(-far)):
        torch.testing.assert_close(at, torch.zeros_like(far), rtol=0, atol=1e-18)


def test_compiled_code_has_the_entries_and_their_numbers(emulation: Emulation) -> None:
    assert emulation.activations() == NAMES


@needs_triton
def test_triton_has_the_entries() -> None:
    from fusion_kernels.mlp import _triton_tiles

    kernel: Any = _triton_tiles.activation
    tree = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn)))
    named = {
        node.comparators[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and isinstance(node.comparators[0], ast.Constant)
        if isinstance(node.left, ast.Name) and node.left.id == "ACTIVATION"
    }
    assert named == {*NAMES, "none"}


def test_documentation_and_oracles_have_the_entries() -> None:
    for function in (get_activation, fused_mlp):
        assert set(re.findall(r"`([a-z0-9_]+)`", inspect.getdoc(function) or "")) >= set(NAMES)
    assert set(ffn_blocks.ACTIVATIONS) == set(rounding.CURVATURE) == set(NAMES)
    assert blocks.make_block(1).activation in NAMES


@pytest.mark.parametrize("name", ["tanh", "GELU", ""])
@pytest.mark.skipif(native.UNAVAILABLE is not None, reason="no compiled library")
def test_compiled_code_refuses_what_the_table_lacks(name: str) -> None:
    for evaluate in (compiled_block, compiled_factors):
        with pytest.raises(RuntimeError, match="unknown activation"):
            evaluate(torch.ones(3), name)
