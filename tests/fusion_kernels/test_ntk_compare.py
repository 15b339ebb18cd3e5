"""`ntk_compare` against the kernels themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from ffn_blocks import KERNELS, Bundle, make_bundle
from torch import Tensor

from fusion_kernels import native, ntk_compare, ntk_gram, ntk_operator
from fusion_kernels.ntk import Kernel
from fusion_kernels.ntk import compare as module

BACKENDS = ["reference", *([] if native.UNAVAILABLE else ["cpu"])]


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def pair(gated: bool = False) -> tuple[Bundle, Bundle]:
    """A block and a narrower one that resembles it."""
    wide = make_bundle(9, 20, 4, gated=gated)
    names = [n for n in ("w_in", "w_gate", "b_in", "b_gate", "w_out") if getattr(wide, n) is not None]
    narrow = replace(wide, **{n: getattr(wide, n)[:, ::2] * 1.1 for n in names}, scale=torch.full((1, 10), 2).double())
    return wide, narrow


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("rows", [1, 17, 123])
def test_it_is_what_the_kernels_say(backend: str, kernel: Kernel, gated: bool, rows: int) -> None:
    a, b = pair(gated)
    x = torch.randn(rows, 9).double()
    metric = torch.rand(10).double()
    for reduce in ("trace", "pseudo", torch.randn(4).double()):
        ka = ntk_gram(a, x, reduce=reduce, kernel=kernel)
        kb = ntk_gram(b, x, reduce=reduce, kernel=kernel, metric=metric)
        found = ntk_compare(
            a, b, x, reduce, kernel=kernel, metrics=(None, metric), backend=backend, block_size=50, eigenvalues=4
        )
        assert (found.rows, found.columns, found.standard_error) == (rows, rows, 0.0)
        assert found.relative_error == pytest.approx(float((ka - kb).norm() / ka.norm()), rel=1e-9)
        assert found.cosine == pytest.approx(cosine(ka, kb), rel=1e-9)
        assert found.trace == pytest.approx((float(ka.trace()), float(kb.trace())))
        if rows > 1:
            h = torch.eye(rows).double() - 1 / rows
            assert found.alignment == pytest.approx(cosine(h @ ka @ h, h @ kb @ h), rel=1e-7)
        if kernel == "gd":
            for gram, values, errors in zip((ka, kb), found.eigenvalues, found.eigenvalue_errors, strict=True):
                expected = torch.linalg.eigvalsh(gram).flip(0)[:4]
                assert len(values) == min(4, rows)
                assert ((values - expected).abs() <= errors + 1e-9 * expected[0]).all()
                torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-9 * float(expected[0]))
        else:
            assert len(found.eigenvalues[0]) == 0


def test_a_block_with_itself() -> None:
    a, _ = pair()
    found = ntk_compare(a, a, torch.randn(40, 9).double())
    assert found.relative_error == 0.0
    assert found.cosine == pytest.approx(1.0)
    assert found.alignment == pytest.approx(1.0)
    assert found.trace[0] == found.trace[1]
    assert torch.equal(*found.eigenvalues)


@pytest.mark.parametrize("kernel", KERNELS)
def test_drawn_columns_err_as_they_say(kernel: Kernel) -> None:
    a, b = pair()
    x = torch.randn(400, 9).double()
    exact = ntk_compare(a, b, x, kernel=kernel, eigenvalues=0)
    deviations = []
    for seed in range(12):
        found = ntk_compare(a, b, x, kernel=kernel, columns=64, seed=seed, eigenvalues=0)
        assert found.columns == 64
        assert 0 < found.standard_error < 0.2 * exact.relative_error
        deviations.append((found.relative_error - exact.relative_error) / found.standard_error)
        assert found.alignment == pytest.approx(exact.alignment, abs=0.03)
        assert found.alignment <= 1
    assert max(map(abs, deviations)) < 5
    assert 0.3 < float(torch.tensor(deviations).square().mean().sqrt()) < 2
    again = ntk_compare(a, b, x, kernel=kernel, columns=64, seed=11, eigenvalues=0)
    assert again.relative_error == found.relative_error
    every = ntk_compare(a, b, x, kernel=kernel, columns=400, eigenvalues=0)
    assert every.relative_error == pytest.approx(exact.relative_error, rel=1e-12)
    assert every.alignment == pytest.approx(exact.alignment, rel=1e-9)


def test_large_sign_kernels_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXACT_SIGN_ROWS", 50)
    monkeypatch.setattr(module, "SAMPLED_COLUMNS", 32)
    a, b = pair()
    x = torch.randn(51, 9).double()
    assert ntk_compare(a, b, x, kernel="sign").columns == 32
    assert ntk_compare(a, b, x[:50], kernel="sign").columns == 50
    assert ntk_compare(a, b, x, kernel="gd").columns == 51


@pytest.mark.skipif(native.UNAVAILABLE is not None, reason=str(native.UNAVAILABLE))
def test_the_sums_do_not_depend_on_the_number_of_threads() -> None:
    a, b = (block.to(torch.float32) for block in pair(True))
    x = torch.randn(517, 9)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(ntk_compare(a, b, x, eigenvalues=0))
    finally:
        torch.set_num_threads(threads)
    assert found[0].relative_error == found[1].relative_error == found[2].relative_error
    assert found[0].cosine == found[1].cosine == found[2].cosine


def test_float32_is_close() -> None:
    a, b = pair(True)
    x = torch.randn(300, 9).double()
    exact, found = ntk_compare(a, b, x), ntk_compare(a.to(torch.float32), b.to(torch.float32), x.float())
    assert found.relative_error == pytest.approx(exact.relative_error, rel=1e-5)
    assert found.alignment == pytest.approx(exact.alignment, rel=1e-5)
    torch.testing.assert_close(found.eigenvalues[0], exact.eigenvalues[0], rtol=1e-5, atol=1e-5)


def test_lanczos_on_a_kernel_of_low_rank() -> None:
    bundle = make_bundle(3, 1, 1, bias=False)
    operator = ntk_operator(bundle, torch.randn(30, 3).double())
    gram = operator.matmat(torch.eye(30).double())
    values, errors = module.largest_eigenvalues(operator, 30, steps=30, seed=0)
    expected = torch.linalg.eigvalsh(gram).flip(0)
    torch.testing.assert_close(values[:4], expected[:4])
    assert (values[4:].abs() <= 1e-10 * expected[0]).all()
    assert (errors <= 1e-8 * expected[0]).all()


def test_unconverged_eigenvalues_say_how_far_they_are() -> None:
    operator = ntk_operator(make_bundle(20, 50, 2), torch.randn(80, 20).double())
    exact = torch.linalg.eigvalsh(operator.matmat(torch.eye(80).double()))
    for steps in (3, 5, 8):
        values, errors = module.largest_eigenvalues(operator, 3, steps=steps, seed=1)
        distances = (values[:, None] - exact).abs().amin(1)
        assert distances.max() > 1e-6
        assert (distances <= errors).all()
        assert (errors < exact[-1]).all()


def test_zero_kernels() -> None:
    a, b = pair()
    zero = replace(a, w_out=torch.zeros_like(a.w_out))
    x = torch.randn(5, 9).double()
    assert ntk_compare(zero, zero, x, params="w_in").relative_error == 0.0
    assert ntk_compare(zero, b, x, params="w_in").relative_error == float("inf")
    assert ntk_compare(a, zero, x, params="w_in").relative_error == pytest.approx(1.0)
    assert ntk_compare(a, zero, x, params="w_in").cosine != ntk_compare(a, zero, x, params="w_in").cosine


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"x": torch.zeros(0, 9).double()}, "x must have at least one row"),
        ({}, {"kernel": "adam"}, "unknown kernel 'adam'"),
        ({}, {"reduce": "full"}, "reduce 'full' has an axis of outputs"),
        ({}, {"columns": 3}, "columns must be between 8 and the 20 inputs, got 3"),
        ({}, {"columns": 21}, "columns must be between 8 and the 20 inputs, got 21"),
        ({}, {"eigenvalues": -1}, "eigenvalues must not be negative"),
        ({}, {"block_size": 0}, "block_size must be at least 1"),
        ({}, {"x": torch.full((20, 9), float("nan")).double()}, "x has values that are not finite"),
        ({"w_out": torch.zeros(1, 20, 3).double(), "b_out": None}, {}, "must have as many outputs: 4 and 3"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], options: dict[str, Any], message: str) -> None:
    a, _ = pair()
    options = {"x": torch.randn(20, 9).double(), **options}
    with pytest.raises(ValueError, match=re.escape(message)):
        ntk_compare(a, replace(a, **change), **options)


@pytest.mark.parametrize("kernel", KERNELS)
def test_opcheck(kernel: Kernel) -> None:
    a, b = pair(True)
    blocks = []
    for bundle in (a, b):
        parts = bundle.parts()
        scale = None if bundle.scale is None else bundle.scale[0]
        tensors = [parts["w_in"], parts["w_gate"], parts["b_in"], parts["b_gate"], parts["w_out"], scale, None]
        blocks += [tensors, 0.0, "gelu", list(parts)]
    x = torch.randn(6, 9).double()
    torch.library.opcheck(module._NTK_SUMS.overload, (x, x[:4].clone(), *blocks, kernel, torch.randn(4).double(), 3))
