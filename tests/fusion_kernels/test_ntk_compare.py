"""`ntk_compare` against the kernels themselves."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from ffn_blocks import KERNELS, Bundle, make_bundle
from tensor_sizes import LargestTensor
from torch import Tensor

from fusion_kernels import native, ntk_compare, ntk_gram, ntk_operator
from fusion_kernels.gates import PLAIN
from fusion_kernels.ntk import Kernel
from fusion_kernels.ntk import compare as module
from fusion_kernels.ntk import reference as reference

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


def described_blocks(*bundles: Bundle) -> list[Any]:
    """Gated blocks as the operator takes them."""
    blocks: list[Any] = []
    for bundle in bundles:
        blocks += [[*bundle.at(0).tensors, None], 0.0, "gelu", *PLAIN.arguments, list(bundle.parts())]
    return blocks


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
    most = ntk_compare(a, b, x, kernel=kernel, columns=396, eigenvalues=0)
    assert abs(most.relative_error - exact.relative_error) < 5 * most.standard_error
    assert most.standard_error < 0.003 * exact.relative_error


@pytest.mark.parametrize("kernel", KERNELS)
def test_all_columns_are_the_exact_kernels(kernel: Kernel) -> None:
    a, b = pair()
    x = torch.randn(60, 9).double()
    exact, every = (ntk_compare(a, b, x, kernel=kernel, columns=columns, eigenvalues=0) for columns in (None, 60))
    assert every.standard_error == 0.0
    assert (every.relative_error, every.cosine, every.alignment) == (
        exact.relative_error, exact.cosine, exact.alignment
    )  # fmt: skip


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("inputs", ["mean", "outlier channel"])
def test_nearly_constant_kernels_align_as_in_float64(backend: str, kernel: Kernel, inputs: str) -> None:
    """Inputs far from the origin: what the centring leaves is a millionth of the sums, or less."""
    wide = make_bundle(64, 32, 8, bias=False)
    blocks = wide, replace(wide, w_in=wide.w_in[:, ::2], w_out=wide.w_out[:, ::2])
    x = torch.randn(500, 64)
    if inputs == "mean":
        x += 30 * torch.randn(64)
    else:
        x[:, 3] += 300
    ka, kb = (ntk_gram(block, x.double(), kernel=kernel) for block in blocks)
    ka, kb = (k - k.mean(0) - k.mean(1, keepdim=True) + k.mean() for k in (ka, kb))
    a, b = (block.to(torch.float32) for block in blocks)
    found = ntk_compare(a, b, x, kernel=kernel, backend=backend, eigenvalues=0)
    assert found.alignment == pytest.approx(cosine(ka, kb), abs=2e-5)
    drawn = ntk_compare(a, b, x, kernel=kernel, backend=backend, eigenvalues=0, columns=400)
    assert drawn.alignment == pytest.approx(cosine(ka, kb), abs=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_kernels_have_no_alignment(backend: str, dtype: torch.dtype) -> None:
    a, b = (block.to(dtype) for block in pair())
    found = ntk_compare(a, b, torch.randn(137, 9, dtype=dtype), params="b_out", backend=backend, eigenvalues=0)
    assert found.cosine == pytest.approx(1.0)
    assert math.isnan(found.alignment)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("rows", "others"), [(123, None), (123, 17), (1, 17), (0, 4), (4, 0), (1537, None)])
def test_the_operator_returns_sums_of_the_kernels(backend: str, kernel: Kernel, rows: int, others: int | None) -> None:
    a, b = pair(True)
    x1 = torch.randn(rows, 9).double()
    x2 = None if others is None else torch.randn(others, 9).double()
    ka, kb = (ntk_gram(block, x1, x2, kernel=kernel) for block in (a, b))
    described = described_blocks(a, b)
    operator = module._NTK_SUMS
    function = operator.overload if backend == "cpu" else operator.select(backend, x1.device).function
    sums, of_rows, of_columns = function(x1, x2, *described, kernel, None, 50)
    inner = [(ka * ka).sum(), (ka * kb).sum(), (kb * kb).sum(), (ka - kb).square().sum()]
    torch.testing.assert_close(sums, torch.stack(inner), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(of_rows, torch.stack([ka.sum(1), kb.sum(1)]), rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(of_columns, torch.stack([ka.sum(0), kb.sum(0)]), rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lanczos_finds_equal_eigenvalues(dtype: torch.dtype) -> None:
    """One linear neuron and orthonormal inputs: a multiple of the identity, whose Krylov spaces have one dimension."""
    torch.manual_seed(0)
    bundle = make_bundle(6, 1, 1, activation="relu").to(dtype)
    bundle = replace(bundle, b_in=torch.full((1, 1), 50, dtype=dtype))
    x = torch.eye(6, dtype=dtype)
    found = ntk_compare(bundle, bundle, x, params="w_in", eigenvalues=6)
    expected = ntk_gram(bundle, x, params="w_in").diagonal().double()
    assert expected[0] > 0
    torch.testing.assert_close(found.eigenvalues[0], expected, rtol=1e-6, atol=0)
    assert (found.eigenvalue_errors[0] <= 1e-6 * expected[0]).all()


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
    assert math.isnan(ntk_compare(a, zero, x, params="w_in").cosine)


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
        ({"w_in": torch.zeros(1, 20, 7).double()}, {}, "x must be (N, 7) for this block, got (20, 9)"),
        ({"b_in": torch.full((1, 20), float("inf"))}, {}, "b_in has values that are not finite"),
        ({}, {"metrics": (None, torch.ones(19))}, "metric must be (20,), one per neuron, got (19,)"),
        ({}, {"backend": "fortran"}, "ntk_sums: unknown backend 'fortran'"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], options: dict[str, Any], message: str) -> None:
    a, _ = pair()
    options = {"x": torch.randn(20, 9).double(), **options}
    with pytest.raises(ValueError, match=re.escape(message)):
        ntk_compare(a, replace(a, **change), **options)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_the_reference_stores_no_kernel(monkeypatch: pytest.MonkeyPatch, kernel: Kernel, gated: bool) -> None:
    a, b = pair(gated)
    x, bound = torch.randn(600, 9).double(), 300 * 600 * 8
    gram = ntk_gram(a, x, kernel=kernel)
    compared = ntk_compare(a, b, x, kernel=kernel, backend="reference", eigenvalues=0)
    monkeypatch.setattr(reference, "BLOCK_BYTES", 2**18)
    with LargestTensor() as largest:
        found = ntk_compare(a, b, x, kernel=kernel, backend="reference", eigenvalues=0)
    assert largest.bytes <= bound
    assert found.relative_error == pytest.approx(compared.relative_error, rel=1e-10)
    assert found.alignment == pytest.approx(compared.alignment, rel=1e-8)

    result = torch.empty(600, 600).double()
    with LargestTensor(beside=result) as largest:
        ntk_gram(a, x, kernel=kernel, backend="reference", out=result)
    assert largest.bytes <= bound
    torch.testing.assert_close(result, gram)


@pytest.mark.parametrize("kernel", KERNELS)
def test_opcheck(kernel: Kernel) -> None:
    blocks = described_blocks(*pair(True))
    x = torch.randn(6, 9).double()
    torch.library.opcheck(module._NTK_SUMS.overload, (x, x[:4].clone(), *blocks, kernel, torch.randn(4).double(), 3))
