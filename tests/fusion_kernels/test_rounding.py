"""The instrument that the operators' results are measured with: what it lets pass, and what it catches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ntk_rounding
import pytest
import torch
from blocks import MLPCall, make_block
from ffn_blocks import KERNELS, make_bundle
from rounding import CURVATURE, Arithmetic, Rounded, assert_rounding, within_bound
from torch import Tensor

from fusion_kernels import ntk_gram
from fusion_kernels.activations import ACTIVATIONS
from fusion_kernels.ntk import Kernel

Results = dict[str, Tensor]
#: What is found, what it is, how far it may be from that, and what torch finds.
Case = tuple[Results, Results, Mapping[str, Rounded], Results]


def block_case(dtype: torch.dtype, gated: bool, seed: int = 0) -> Case:
    """Outputs and gradients of a block of a realistic shape; what was found is torch's, of tokens in another order."""
    block = make_block(64, d=128, h=64, d_out=128, gated=gated, seed=seed).to(dtype)

    def run(b: MLPCall) -> Results:
        b = b.to(b.x.dtype).training()
        y = b.eager()
        return b.gradients(y) | {"y": y.detach()}

    turned = run(replace(block, x=block.x.flip(0), dy=block.dy.flip(0)))
    turned |= {name: turned[name].flip(0) for name in ("x", "y")}
    return turned, run(block.to(torch.float64)), block.bounds(dtype), run(block)


def gram_case(kernel: Kernel) -> Case:
    """A tangent kernel in float32; what was found is the reference's, of neurons in another order."""
    bundle = make_bundle(64, 48, 8, gated=True, scale=True, scale_exponent=0.5).to(torch.float32)
    x = torch.randn(80, 64)
    names = ("w_in", "w_gate", "b_in", "b_gate", "w_out", "scale")
    turned = replace(bundle, **{name: getattr(bundle, name).flip(1) for name in names})
    found, exact, torchs = (
        {"K": ntk_gram(b, rows, kernel=kernel, backend="reference")}
        for b, rows in ((turned, x), (bundle.to(torch.float64), x.double()), (bundle, x))
    )
    return found, exact, {"K": ntk_rounding.gram(Arithmetic(torch.float32), bundle, x, None, kernel=kernel)}, torchs


CASES: dict[str, Callable[[], Case]] = {
    **{
        f"{'gated' if gated else 'plain'} {dtype}": lambda dtype=dtype, gated=gated: block_case(dtype, gated)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for gated in (False, True)
    },
    **{f"{kernel} kernel": lambda kernel=kernel: gram_case(kernel) for kernel in KERNELS},
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CASES[request.param]()


def broken(found: Results, name: str, exact: Tensor, units: float, share: float) -> Results:
    """`found`, with `units` in the last place of a share of the entries of one result added or taken off.

    The unit is that of the entry or, where sums have cancelled, of the usual entry.
    """
    g = torch.Generator().manual_seed(1)
    own = found[name].double()
    usual = exact.square().mean().sqrt()
    unit = torch.finfo(found[name].dtype).eps * torch.maximum(exact.abs(), usual)
    here = torch.rand(own.shape, generator=g) < share
    direction = torch.where(torch.rand(own.shape, generator=g) < 0.5, -1.0, 1.0)
    return found | {name: torch.where(here, own + units * unit * direction, own)}


def test_what_rounding_does_passes(case: Case) -> None:
    found, exact, bounds, torchs = case
    assert_rounding(found, exact, bounds, torchs)


def test_ten_units_of_every_entry_are_caught_and_twenty_of_a_tenth(case: Case) -> None:
    """Of vectors, whose own errors are several units, 20 of every entry."""
    found, exact, bounds, torchs = case
    for name, value in exact.items():
        for units, share in ((10, 1.0), (20, 0.1)) if value.ndim == 2 else ((20, 1.0),):
            with pytest.raises(AssertionError, match=f"^({name}|together): "):
                assert_rounding(broken(found, name, value, units, share), exact, bounds, torchs)


def test_one_gross_entry_is_caught_without_a_peer(case: Case) -> None:
    """Of the size of a usual entry or less; in bfloat16, where each product may be 2^-8 off, some times that."""
    found, exact, bounds, _ = case
    for name, value in exact.items():
        place = (len(value) // 2, *(0,) * (value.ndim - 1))
        wrong = found[name].double().clone()
        usual = {torch.float32: 0.01, torch.float16: 1.0, torch.bfloat16: 8.0}[found[name].dtype]
        wrong[place] += usual * value.square().mean().sqrt()
        with pytest.raises(AssertionError, match=f"{name}: .* times what rounding may do"):
            assert_rounding(found | {name: wrong}, exact, bounds)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_entry_that_is_not_finite_is_caught(value: float) -> None:
    found, exact, bounds, _ = block_case(torch.float32, False)
    wrong = found["y"].clone()
    wrong[3, 4] = value
    with pytest.raises(AssertionError, match="y: "):
        assert_rounding(found | {"y": wrong}, exact, bounds)
    nothing: Any = Arithmetic(torch.float32).exact(torch.zeros(2))
    with pytest.raises(AssertionError, match="inf times"):
        assert_rounding({"y": torch.tensor([0.0, 1e-30])}, {"y": torch.zeros(2).double()}, {"y": nothing})


@pytest.mark.parametrize("scale", [None, "int", "float", "both"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_formulas_behind_the_bounds_are_those_of_the_block(activation: str, gated: bool, scale: str | None) -> None:
    block = make_block(5, 4, gated=gated, scale=scale, activation=activation).training()
    y = block.eager()
    bounds = block.bounds(torch.float64)
    for name, value in (block.gradients(y) | {"y": y.detach()}).items():
        torch.testing.assert_close(bounds[name].value, value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_and_curvatures_of_activations(activation: str) -> None:
    z = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    slope = ACTIVATIONS[activation].derivative(z)
    step = z[1] - z[0]
    curvature = float((slope.diff() / step)[(z[1:] * z[:-1] > 0)].abs().max())
    assert 0.9 * CURVATURE[activation] <= curvature <= 1.001 * CURVATURE[activation]
    # And a value is where it should be when its argument is not.
    for dtype in (torch.float32, torch.bfloat16):
        given = Rounded(z, 0.010001 * z.abs(), Arithmetic(dtype))
        for moved in (z * 1.01, z * 0.99):
            for found, bound in zip(
                (ACTIVATIONS[activation].function(moved), ACTIVATIONS[activation].derivative(moved)),
                given.activated(activation),
                strict=True,
            ):
                assert float(within_bound(found, bound.value, bound).max()) <= 1
