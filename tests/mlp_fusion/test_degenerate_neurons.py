"""Methods on neurons that repeat, that are silent, and whose weights are very large or very small."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from mlp_fusion.choices import METHODS, NEED_TEXT
from mlp_fusion.errors import InputError
from mlp_fusion.measure.errors import ffn_errors, leading_eigenvalues
from mlp_fusion.methods import get_method
from mlp_fusion.neurons import NeuronBundle

CLUSTERING = ("fusion", "published", "cluster")


def bundle(neurons: int, distinct: int | None = None, gated: bool = False) -> NeuronBundle:
    """An FFN of 6 inputs and 5 outputs whose neurons repeat after `distinct`."""
    g = torch.Generator().manual_seed(0)
    index = torch.arange(neurons) % (neurons if distinct is None else distinct)

    def rows(*shape: int) -> Tensor:
        return torch.randn(1, neurons, *shape, generator=g)[:, index]

    return NeuronBundle(rows(6), rows(5), "silu", w_gate=rows(6) if gated else None, b_in=rows())


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).double().norm() / expected.double().norm())


# --- neurons that repeat ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("method", CLUSTERING)
def test_fewer_distinct_neurons_than_clusters_leave_no_zero_row(method: str, gated: bool) -> None:
    original = bundle(24, distinct=5, gated=gated)
    found = get_method(method)(original, 9, seed=0)
    reduced = found.bundle
    assert found.status == ("few_distinct",)
    assert found.counts is not None
    assert int(found.counts.min()) > 0
    assert int(found.counts.sum()) == 24
    assert float(reduced.w_in.norm(dim=2).min()) > 0.1
    if reduced.scale is not None:
        assert torch.equal(reduced.scale, found.counts.float())
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    assert relative(reduced.forward(x), original.forward(x)) < 1e-5


@pytest.mark.parametrize("method", CLUSTERING)
def test_silent_neurons_are_shared_out_last(method: str) -> None:
    original = bundle(24, distinct=5)
    alive = (torch.arange(24) % 5 > 0).float()[None]
    silent = dataclasses.replace(
        original,
        w_in=original.w_in * alive[..., None],
        w_out=original.w_out * alive[..., None],
        b_in=original.b_in * alive if original.b_in is not None else None,
    )
    reduced = get_method(method)(silent, 9, seed=0).bundle
    assert int((reduced.w_in.norm(dim=2) == 0).sum()) == 1
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    assert relative(reduced.forward(x), silent.forward(x)) < 1e-5


# --- weights of any size ---------------------------------------------------------------------------------------------


#: Methods whose choice does depend on the units, since their distances add up inputs and outputs.
UNITS_COUNT = ("published", "cluster")


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("method", [name for name in METHODS if name not in {"mmd", *NEED_TEXT}])
@pytest.mark.parametrize(("inputs", "outputs"), [(66, 0), (0, 66), (-66, 0), (0, -66), (66, 66), (-66, -66)])
def test_powers_of_two_change_nothing_but_the_units(method: str, inputs: int, outputs: int, gated: bool) -> None:
    relu = dataclasses.replace(bundle(24, gated=gated), activation="relu")
    assert relu.b_in is not None
    a, b = 2.0**inputs, 2.0**outputs
    gate = None if relu.w_gate is None else a * relu.w_gate
    scaled = dataclasses.replace(relu, w_in=a * relu.w_in, b_in=a * relu.b_in, w_gate=gate, w_out=b * relu.w_out)
    expected, found = (get_method(method)(each, 12, seed=0) for each in (relu, scaled))
    assert bool(found.bundle.vectors().isfinite().all())
    assert set(found.status) <= {"ok", "max_iter"}
    if found.inertia is not None:
        assert bool(found.inertia.isfinite().all())
    if method not in UNITS_COUNT or inputs == outputs:
        torch.testing.assert_close(found.bundle.w_in / a, expected.bundle.w_in)
        torch.testing.assert_close(found.bundle.w_out / b, expected.bundle.w_out)


def test_herding_refuses_what_its_distances_cannot_hold() -> None:
    large = dataclasses.replace(bundle(24), w_in=2.0**66 * bundle(24).w_in)
    with pytest.raises(InputError, match=r"weights of up to \de\+20 are not for method 'mmd': use another method"):
        get_method("mmd")(large, 12, seed=0)


# --- the report's figures --------------------------------------------------------------------------------------------


def test_measuring_leaves_the_number_of_threads_alone() -> None:
    threads = torch.get_num_threads()
    seen: list[int] = []
    kernel = torch.diag(torch.arange(40.0))

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is torch.linalg.eigvalsh:
                seen.append(torch.get_num_threads())
            return super().__torch_function__(func, types, args, kwargs or {})

    try:
        torch.set_num_threads(2)
        assert leading_eigenvalues(kernel.as_subclass(Watched))[:3] == [39.0, 38.0, 37.0]
        assert seen == [1]
        small = bundle(8)
        ffn_errors(small, small, torch.randn(9, 6))
        with pytest.raises(ValueError, match="finite"):
            ffn_errors(small, small, torch.full((9, 6), torch.nan))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_rows_that_repeat_have_a_spectrum() -> None:
    """LAPACK finds no eigenvalues of some such kernels in float32 as they are."""
    for seed in range(128):
        g = torch.Generator().manual_seed(seed)
        x = torch.randint(-3, 4, (3, 8), generator=g).float()[torch.randint(0, 3, (64,), generator=g)]
        x *= torch.rand(64, 1, generator=g) < 0.2
        expected = torch.linalg.svdvals(x.double()).square()
        found = torch.tensor(leading_eigenvalues(x @ x.T), dtype=torch.float64)
        assert float((found[:8] - expected).abs().max()) <= 1e-4 * float(expected.sum())
