"""Products with Jacobians and tangent kernels against torch.func, and per-sample gradients against autograd."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ntk_rounding
import numpy as np
import pytest
import torch
from ffn_blocks import KERNELS, Bundle, forward, full_gram, make_bundle
from rounding import Arithmetic, assert_rounding
from scipy.sparse.linalg import aslinearoperator, cg, eigsh
from tensor_sizes import LargestTensor
from torch import Tensor

from fusion_kernels import (
    gradient_dots,
    gradient_gram,
    gradient_norms,
    jvp,
    native,
    ntk_compare,
    ntk_gram,
    ntk_operator,
    ntk_vp,
    trace_ntk_vp,
    vjp,
)
from fusion_kernels.ffn import PARTS
from fusion_kernels.library import Operator
from fusion_kernels.ntk import Kernel, heuristics, operators
from fusion_kernels.ntk import reference as reference
from fusion_kernels.ntk.block import prepare

BACKENDS = ["reference", *([] if native.UNAVAILABLE else ["cpu"])]
#: Of the products.
PRODUCTS = ["torch", "reference"]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SHAPES = [(1, 1, 1, 1), (17, 33, 123, 5), (123, 17, 5, 3), (7, 40, 41, 1)]


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def block(d: int, neurons: int, outputs: int, gated: bool) -> Bundle:
    return make_bundle(d, neurons, outputs, gated=gated, scale=True, scale_exponent=0.5)


@pytest.mark.parametrize("backend", PRODUCTS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(("rows", "d", "neurons", "outputs"), SHAPES)
def test_jvp_and_vjp_are_those_of_torch_func(
    backend: str, gated: bool, rows: int, d: int, neurons: int, outputs: int
) -> None:
    bundle = block(d, neurons, outputs, gated)
    x, parts = torch.randn(rows, d).double(), bundle.parts()
    tangents = {name: torch.randn_like(t) for name, t in parts.items()}
    _, expected = torch.func.jvp(lambda theta: forward(bundle, theta, x), (parts,), (tangents,))
    found = jvp(bundle, x, {name: t[None] for name, t in tangents.items()}, backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)

    c = torch.randn(rows, outputs).double()
    (gradients,) = torch.func.vjp(lambda theta: forward(bundle, theta, x), parts)[1](c)
    pulled = vjp(bundle, x, c, backend=backend)
    assert list(pulled) == [p for p in PARTS if p in parts]
    for name, gradient in gradients.items():
        torch.testing.assert_close(pulled[name], gradient[None], rtol=1e-10, atol=1e-10)
    assert set(vjp(bundle, x, c, params="w_out", backend=backend)) == {"w_out"}


def test_parts_left_out_of_tangents_stay() -> None:
    bundle = block(5, 6, 3, True)
    x = torch.randn(4, 5).double()
    tangents = {name: torch.randn_like(t)[None] for name, t in bundle.parts().items()}
    alone = sum((jvp(bundle, x, {name: t}) for name, t in tangents.items()), torch.zeros(4, 3).double())
    torch.testing.assert_close(alone, jvp(bundle, x, tangents))
    assert torch.equal(jvp(bundle, x, {}), torch.zeros(4, 3).double())


def test_frozen_parts_may_move() -> None:
    """What is asked for is the tangents' business: a frozen block has a derivative along them all the same."""

    class Frozen(Bundle):
        def trainable_parts(self) -> tuple[str, ...]:
            return ()

    bundle = block(5, 6, 3, True)
    frozen = Frozen(**vars(bundle))
    x, c = torch.randn(2, 4, 5).double(), torch.randn(2, 4, 3).double()
    tangents = {name: torch.randn_like(t)[None] for name, t in bundle.parts().items()}
    for some in (tangents, {"w_in": tangents["w_in"]}, {}):
        assert torch.equal(jvp(frozen, x[0], some), jvp(bundle, x[0], some))
        assert torch.equal(gradient_dots(frozen, x, c, some), gradient_dots(bundle, x, c, some))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_arrays_come_back_as_arrays_in_the_dtype_of_the_operator(device: str) -> None:
    x, v = torch.randn(7, 5), np.random.default_rng(0).standard_normal((7, 2))
    bundle = make_bundle(5, 6, 3).to(torch.float32)
    tensors = {name: t.to(device) for name, t in vars(bundle).items() if isinstance(t, Tensor)}
    operator = ntk_operator(replace(bundle, **tensors), x.to(device))
    for found in (operator.matmat(v), operator.matvec(v[:, 0])[:, None]):
        assert isinstance(found, np.ndarray)
        assert found.dtype == operator.dtype == np.float32
        expected = ntk_gram(bundle, x).double().numpy() @ v[:, : found.shape[1]]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(
    ("d", "neurons", "outputs", "silent"), [(0, 4, 3, False), (5, 0, 3, False), (5, 4, 0, False), (5, 4, 3, True)]
)
def test_sizes_of_zero(kernel: Kernel, gated: bool, d: int, neurons: int, outputs: int, silent: bool) -> None:
    bundle = block(d, neurons, outputs, gated)
    if silent:
        bundle = replace(bundle, scale=torch.zeros(1, neurons))
    x, v = torch.randn(9, d).double(), torch.randn(9, outputs).double()
    full = full_gram(bundle, x, x, kernel) if not silent else torch.ones(9, 9, 1, 1) * torch.eye(outputs).double()
    full = full.double()
    traces = full.diagonal(dim1=2, dim2=3).sum(2)
    for backend in BACKENDS:
        for reduce, expected in (("full", full), ("diagonal", full.diagonal(dim1=2, dim2=3)), ("trace", traces)):
            options: dict[str, Any] = {"kernel": kernel, "backend": backend}
            found = ntk_gram(bundle, x, reduce=reduce, **options)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
            found = ntk_gram(bundle, x, x[:4], reduce, **options)
            torch.testing.assert_close(found, expected[:, :4], rtol=1e-9, atol=1e-9)
        compared = ntk_compare(bundle, bundle, x, **options)
        assert compared.relative_error == 0.0
        assert compared.trace[0] == pytest.approx(float(traces.trace()))
    for backend in PRODUCTS:
        options = {"kernel": kernel, "backend": backend}
        torch.testing.assert_close(ntk_vp(bundle, x, v, **options), torch.einsum("nmop,mp->no", full, v))
        columns = x[:, :1].expand(9, min(d, 1))
        torch.testing.assert_close(trace_ntk_vp(bundle, x, columns, **options), traces @ x[:, :1])
        torch.testing.assert_close(trace_ntk_vp(bundle, x, torch.ones(9), **options), traces.sum(1))


@pytest.mark.parametrize("name", ["x", "w_in", "b_gate", "w_out", "b_out", "scale", "metric", "cotangents"])
def test_values_that_are_not_finite_are_named(name: str) -> None:
    """All are looked at in one pass; the message is of the first."""
    bundle = block(5, 6, 3, True)
    rows = {"x": torch.randn(2, 4, 5), "cotangents": torch.randn(2, 4, 3), "metric": torch.rand(6)}
    tensor = rows[name] if name in rows else getattr(bundle, name)
    tensor.view(-1)[-1] = float("nan")
    with pytest.raises(ValueError, match=rf"^{name} has values that are not finite"):
        gradient_norms(bundle, rows["x"], rows["cotangents"], metric=rows["metric"])


def test_neurons_of_scale_zero_have_no_gradient() -> None:
    bundle = block(5, 6, 3, True)
    assert bundle.scale is not None
    bundle.scale[0, 2] = 0
    x, c = torch.randn(4, 5).double(), torch.randn(4, 3).double()
    pulled = vjp(bundle, x, c)
    for name in ("w_in", "b_in", "w_gate", "b_gate", "w_out"):
        assert pulled[name].shape == getattr(bundle, name).shape
        assert (pulled[name][0, 2] == 0).all()
        assert (pulled[name][0, 3] != 0).any()
    squares = sum((t.square().sum() for t in pulled.values()), torch.zeros(()).double())
    torch.testing.assert_close((jvp(bundle, x, pulled) * c).sum(), squares)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(("rows", "d", "neurons", "outputs"), SHAPES)
def test_products_with_kernels(kernel: Kernel, gated: bool, rows: int, d: int, neurons: int, outputs: int) -> None:
    bundle = block(d, neurons, outputs, gated)
    x, metric = torch.randn(rows, d).double(), torch.rand(neurons).double()
    v = torch.randn(rows, outputs).double()
    for parts in (None, ("b_in", "w_out"), ("w_in",)):
        options: dict[str, Any] = {"params": parts, "metric": metric, "kernel": kernel}
        full = ntk_gram(bundle, x, reduce="full", **options)
        expected = torch.einsum("nmop,mp->no", full, v)
        for backend in PRODUCTS:
            found = ntk_vp(bundle, x, v, **options, backend=backend)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        for reduce in ("trace", "pseudo", torch.randn(outputs).double()):
            gram = ntk_gram(bundle, x, reduce=reduce, **options)
            for w in (v, v[:, 0]):
                for backend in PRODUCTS:
                    found = trace_ntk_vp(bundle, x, w, reduce, **options, backend=backend)
                    torch.testing.assert_close(found, gram @ w, rtol=1e-9, atol=1e-9)
            operator = ntk_operator(bundle, x, reduce, shift=0.5, **options)
            torch.testing.assert_close(operator.rmatmat(v), gram.T @ v + 0.5 * v, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(operator.diagonal(), gram.diagonal() + 0.5, rtol=1e-9, atol=1e-9)
        if full.numel() < 20_000:
            matrix = full.transpose(1, 2).reshape(rows * outputs, -1)
            operator = ntk_operator(bundle, x, "full", **options)
            eye = torch.eye(rows * outputs).double()
            torch.testing.assert_close(operator.matmat(eye), matrix, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(operator.rmatmat(eye), matrix.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kernel", KERNELS)
def test_ntk_vp_is_the_jacobian_product_of_torch_func(kernel: Kernel) -> None:
    bundle = block(9, 11, 4, True)
    x, v = torch.randn(6, 9).double(), torch.randn(6, 4).double()
    expected = torch.einsum("nmop,mp->no", full_gram(bundle, x, x, kernel), v)
    torch.testing.assert_close(ntk_vp(bundle, x, v, kernel=kernel), expected, rtol=1e-9, atol=1e-9)
    if kernel == "gd":
        torch.testing.assert_close(jvp(bundle, x, vjp(bundle, x, v)), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("uses", [1, 32])
@pytest.mark.parametrize(("rows", "width", "columns"), [(10, 768, 192), (614, 768, 768), (5000, 768, 192), (3, 2, 1)])
def test_the_cheaper_form_has_fewer_operations(uses: int, rows: int, width: int, columns: int) -> None:
    factored = 4 * rows * width * columns * uses
    through_gram = 2 * rows**2 * columns * uses + 2 * rows**2 * width
    assert heuristics.gram_is_cheaper(rows, width, columns, uses) == (through_gram < factored)


def test_both_forms_are_taken_and_agree() -> None:
    bundle = block(60, 50, 40, False)
    assert heuristics.gram_is_cheaper(10, 60, 50)
    assert not heuristics.gram_is_cheaper(100, 60, 50)
    for rows in (10, 100):
        x, v = torch.randn(rows, 60).double(), torch.randn(rows, 40).double()
        torch.testing.assert_close(ntk_vp(bundle, x, v), jvp(bundle, x, vjp(bundle, x, v)), rtol=1e-9, atol=1e-9)


def test_scipy_solves_and_finds_eigenvalues() -> None:
    bundle = block(9, 30, 4, False)
    x = torch.randn(40, 9).double()
    gram = ntk_gram(bundle, x)
    operator = ntk_operator(bundle, x, shift=1.0)
    assert operator.shape == (40, 40)
    assert operator.dtype == np.float64
    target = torch.randn(40).double()
    solution, info = cg(operator, target.numpy(), rtol=1e-10)
    assert info == 0
    expected = torch.linalg.solve(gram + torch.eye(40).double(), target)
    torch.testing.assert_close(torch.from_numpy(solution), expected, rtol=1e-6, atol=1e-8)
    values = eigsh(ntk_operator(bundle, x), k=3, return_eigenvectors=False)
    np.testing.assert_allclose(values, torch.linalg.eigvalsh(gram)[-3:].numpy(), rtol=1e-9)
    block_of_two = aslinearoperator(ntk_operator(bundle, x)).matmat(np.ones((40, 2)))
    np.testing.assert_allclose(block_of_two[:, 1], gram.sum(1).numpy())
    assert isinstance(operator @ target, Tensor)
    torch.testing.assert_close(operator @ target, gram @ target + target)


def test_float32_operators_keep_their_dtype() -> None:
    bundle = block(9, 30, 4, False).to(torch.float32)
    x = torch.randn(40, 9)
    operator = ntk_operator(bundle, x)
    assert operator.dtype == np.float32
    gram = ntk_gram(bundle.to(torch.float64), x.double())
    v = torch.randn(40)
    assert (operator.matvec(v) - gram @ v.double()).norm() <= 1e-6 * (gram @ v.double()).norm()


def sample_gradients(bundle: Bundle, x: Tensor, c: Tensor, parts: tuple[str, ...] | None) -> dict[str, Tensor]:
    """Part -> (N, ...) gradients of sum_t c_t . F(x_t), by torch.func."""

    def loss(theta: dict[str, Tensor], tokens: Tensor, weights: Tensor) -> Tensor:
        return (forward(bundle, theta, tokens) * weights).sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(bundle.parts(), x, c)
    return {name: g for name, g in found.items() if parts is None or name in parts}


@pytest.mark.parametrize(
    ("form", "backend"), [("auto", "auto"), ("ghost", "torch"), ("direct", "torch"), ("auto", "reference")]
)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("parts", [None, ("w_in",), ("b_in", "w_out"), ("b_out",)], ids=str)
@pytest.mark.parametrize(("samples", "tokens"), [(1, 1), (5, 3), (3, 37)])
def test_per_sample_gradients(
    form: Any, backend: str, gated: bool, parts: tuple[str, ...] | None, samples: int, tokens: int
) -> None:
    bundle = block(9, 11, 4, gated)
    x, c = torch.randn(samples, tokens, 9).double(), torch.randn(samples, tokens, 4).double()
    gradients = sample_gradients(bundle, x, c, parts)
    flat = torch.cat([g.flatten(1) for g in gradients.values()], 1)
    how: dict[str, Any] = {"params": parts, "form": form, "backend": backend}
    gram = gradient_gram(bundle, x, c, **how)
    torch.testing.assert_close(gram, flat @ flat.T, rtol=1e-9, atol=1e-9)
    assert torch.equal(gram, gram.T)
    torch.testing.assert_close(gradient_norms(bundle, x, c, **how), flat.norm(dim=1))

    direction = {name: torch.randn_like(g[0]) for name, g in gradients.items()}
    dots = gradient_dots(bundle, x, c, {name: t[None] for name, t in direction.items()}, backend=backend)
    expected = sum(((g * direction[name]).flatten(1).sum(1) for name, g in gradients.items()), torch.zeros(()).double())
    torch.testing.assert_close(dots, expected)

    metric = torch.rand(11).double()
    weighted = [
        g * (1.0 if name == "b_out" else metric.sqrt().view(-1, *(1,) * (g.ndim - 2))) for name, g in gradients.items()
    ]
    flat = torch.cat([g.flatten(1) for g in weighted], 1)
    found = gradient_gram(bundle, x, c, metric=metric, **how)
    torch.testing.assert_close(found, flat @ flat.T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient_norms(bundle, x, c, metric=metric, **how), flat.norm(dim=1))


def test_gradients_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = block(9, 11, 4, True)
    x, c = torch.randn(7, 5, 9).double(), torch.randn(7, 5, 4).double()
    whole = [gradient_gram(bundle, x, c, form=form) for form in ("ghost", "direct")]
    norms = [gradient_norms(bundle, x, c, form=form) for form in ("ghost", "direct")]
    pulled = vjp(bundle, x[0], c[0])
    monkeypatch.setattr(heuristics, "ROW_BLOCK_BYTES", 1500)
    for part, gradient in vjp(bundle, x[0], c[0]).items():
        torch.testing.assert_close(gradient, pulled[part])
    for form, gram, norm in zip(("ghost", "direct"), whole, norms, strict=True):
        torch.testing.assert_close(gradient_gram(bundle, x, c, form=form), gram)
        torch.testing.assert_close(gradient_norms(bundle, x, c, form=form), norm)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_long_sequences_go_by_tokens(monkeypatch: pytest.MonkeyPatch, gated: bool) -> None:
    bundle = block(9, 11, 4, gated)
    x, c = torch.randn(2, 150, 9).double(), torch.randn(2, 150, 4).double()
    gram, norms = (of(bundle, x, c, form="direct") for of in (gradient_gram, gradient_norms))
    monkeypatch.setattr(heuristics, "ROW_BLOCK_BYTES", 2**15)
    # By name: what an operator does on the inside is not visible to the observer.
    with LargestTensor() as largest:
        torch.testing.assert_close(gradient_gram(bundle, x, c, form="ghost", backend="torch"), gram)
        torch.testing.assert_close(gradient_norms(bundle, x, c, form="ghost", backend="torch"), norms)
    assert 2**14 < largest.bytes <= 2 * 2**15
    assert gradient_gram(bundle, x[:, :0], c[:, :0], form="ghost").eq(0).all()


def test_the_form_changes_where_the_operations_do() -> None:
    # di do / (di + do) of 768 x 192 is 153.6.
    assert heuristics.ghost_norm_is_cheaper(153, 768, 192)
    assert not heuristics.ghost_norm_is_cheaper(154, 768, 192)
    for samples, tokens in ((8, 4), (8, 64), (1000, 12), (1000, 13), (1, 500)):
        ghost = 2 * samples**2 * tokens**2 * (768 + 192)
        direct = 2 * samples * tokens * 768 * 192 + 2 * samples**2 * 768 * 192
        assert heuristics.ghost_gram_is_cheaper(samples, tokens, 768, 192) == (ghost < direct)


@pytest.mark.parametrize("backend", PRODUCTS)
@pytest.mark.parametrize("rows", [0, 3])
def test_no_rows_or_no_tokens(rows: int, backend: str) -> None:
    bundle = block(5, 6, 3, True)
    tokens = 0 if rows else 4
    x, c = torch.zeros(rows, tokens, 5).double(), torch.zeros(rows, tokens, 3).double()
    options: dict[str, Any] = {"backend": backend}
    assert torch.equal(gradient_gram(bundle, x, c, **options), torch.zeros(rows, rows).double())
    assert torch.equal(gradient_norms(bundle, x, c, **options), torch.zeros(rows).double())
    assert torch.equal(gradient_dots(bundle, x, c, {"w_out": bundle.w_out}, **options), torch.zeros(rows).double())
    empty = torch.zeros(0, 5).double()
    assert ntk_vp(bundle, empty, torch.zeros(0, 3).double(), **options).shape == (0, 3)
    assert trace_ntk_vp(bundle, empty, torch.zeros(0).double(), **options).shape == (0,)
    assert trace_ntk_vp(bundle, empty, torch.zeros(0, 2).double(), **options).shape == (0, 2)
    assert jvp(bundle, empty, {}, **options).shape == (0, 3)
    assert float(vjp(bundle, empty, torch.zeros(0, 3).double(), **options)["w_in"].abs().sum()) == 0.0


def product_calls(gated: bool, **changes: Any) -> dict[str, tuple[Operator, tuple[Any, ...]]]:
    """Each operator with arguments of its schema, of a block with all there is and of rows (4, 5) or (2, 4, 5)."""
    bundle = replace(block(5, 6, 3, gated).to(torch.float32), **changes)
    prepared = prepare(bundle, {"x": torch.randn(4, 5)}, None, None)
    described, parts = prepared.described(), prepared.parts
    tangents = [torch.randn_like(t[0]) if (t := getattr(bundle, name)) is not None else None for name in PARTS]
    x, c, metric = torch.randn(4, 5), torch.randn(4, 3), torch.rand(6)
    tokens = (torch.randn(2, 4, 5), *described, torch.randn(2, 4, 3), parts, metric, "auto")
    return {
        "jvp": (operators.NTK_JVP, (x, *described, tangents)),
        "vjp": (operators.NTK_VJP, (x, *described, c, parts)),
        "vp": (operators.NTK_VP, (x, *described, c, parts, "gd", "full", None, metric)),
        "gram": (operators.NTK_GRADIENT_GRAM, tokens),
        "norms": (operators.NTK_GRADIENT_NORMS, tokens),
    }


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_opcheck(gated: bool) -> None:
    calls = product_calls(gated)
    for operator, arguments in calls.values():
        torch.library.opcheck(operator.overload, arguments)
    *vp, _, _, _, metric = calls["vp"][1]
    torch.library.opcheck(operators.NTK_VP.overload, (*vp, "sign", "vector", torch.randn(3), metric))
    torch.library.opcheck(operators.NTK_VP.overload, (*vp, "gd", "trace", None, None))
    no_bias = product_calls(gated, b_in=None, b_gate=None, b_out=None, scale=None)
    torch.library.opcheck(operators.NTK_VJP.overload, no_bias["vjp"][1])
    still = (*no_bias["jvp"][1][:-1], [None] * 6)
    torch.library.opcheck(operators.NTK_JVP.overload, still)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_a_compiler_sees_one_call(gated: bool) -> None:
    calls = product_calls(gated)

    def every() -> list[Tensor]:
        found = [operator.overload(*arguments) for operator, arguments in calls.values()]
        flat = [t for result in found for t in (result if isinstance(result, list) else [result])]
        # By ones of the shape that the fake kernel has said.
        return [t * torch.ones(t.shape) for t in flat]

    try:
        found = torch.compile(every, backend="aot_eager", fullgraph=True)()
    finally:
        torch._dynamo.reset()
    torch.testing.assert_close(found, every(), rtol=0, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_reference_of_products_forms_no_kernel(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> None:
    bundle, x, v = block(5, 6, 3, True), torch.randn(60, 5).double(), torch.randn(60, 3).double()
    tokens, c = torch.randn(30, 2, 5).double(), torch.randn(30, 2, 3).double()
    found = ntk_vp(bundle, x, v, kernel=kernel), gradient_gram(bundle, tokens, c), gradient_norms(bundle, tokens, c)
    bound = 2**15
    monkeypatch.setattr(reference, "BLOCK_BYTES", bound)
    with LargestTensor() as largest:
        again = (
            ntk_vp(bundle, x, v, kernel=kernel, backend="reference"),
            gradient_gram(bundle, tokens, c, backend="reference"),
            gradient_norms(bundle, tokens, c, backend="reference"),
        )
    assert bound / 4 < largest.bytes <= bound < 8 * (60 * 3) ** 2
    torch.testing.assert_close(again, found)


def test_products_are_detached() -> None:
    bundle = block(5, 6, 3, False)
    trained = replace(bundle, w_in=bundle.w_in.clone().requires_grad_())
    x, c = torch.randn(4, 5).double().requires_grad_(), torch.randn(4, 3).double().requires_grad_()
    for backend in PRODUCTS:
        found = [
            jvp(trained, x, {"w_in": trained.w_in}, backend=backend),
            *vjp(trained, x, c, backend=backend).values(),
            ntk_vp(trained, x, c, backend=backend),
            gradient_gram(trained, x[None], c[None], backend=backend),
            gradient_norms(trained, x[None], c[None], backend=backend),
        ]
        assert not any(t.requires_grad for t in found)


@pytest.mark.parametrize("backend", PRODUCTS)
def test_products_of_float32_err_as_torch_does(backend: str) -> None:
    """Beside torch.func in float32, both against float64."""
    single = block(33, 123, 17, True).to(torch.float32)
    x, v = torch.randn(40, 33), torch.randn(40, 17)

    def by_torch(b: Bundle, x: Tensor, v: Tensor) -> dict[str, Tensor]:
        parts = b.parts()
        (pulled,) = torch.func.vjp(lambda theta: forward(b, theta, x), parts)[1](v)
        pushed = torch.func.jvp(lambda theta: forward(b, theta, x), (parts,), (pulled,))[1]
        return {"J'v": pulled["w_in"], "Kv": pushed}

    found = {"J'v": vjp(single, x, v, backend=backend)["w_in"][0], "Kv": ntk_vp(single, x, v, backend=backend)}
    assert {t.dtype for t in found.values()} == {torch.float32}
    exact = by_torch(single.to(torch.float64), x.double(), v.double())
    bounds = dict(zip(exact, ntk_rounding.products(Arithmetic(torch.float32), single, x, v), strict=True))
    assert_rounding(found, exact, bounds, by_torch(single, x, v))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b, x: jvp(b, x, {"w_up": x}), "tangents: this block has no 'w_up'"),
        (lambda b, x: jvp(b, x, {"w_in": x}), "tangents['w_in'] must be (1, 6, 5), got (4, 5)"),
        (lambda b, x: jvp(b, x, {"w_in": b.w_in.log()}), "tangents[w_in] has values that are not finite"),
        (lambda b, x: vjp(b, x, x), "cotangent must be (4, 3)"),
        (lambda b, x: ntk_vp(b, x, x), "v must be (4, 3)"),
        (lambda b, x: ntk_vp(b, x, x[:, :3], kernel="adam"), "unknown kernel 'adam'"),
        (lambda b, x: trace_ntk_vp(b, x, x[:3]), "v must be (4,) or (4, M)"),
        (lambda b, x: trace_ntk_vp(b, x, x, "full"), "use ntk_vp for 'full'"),
        (lambda b, x: ntk_operator(b, x, "diagonal"), "the diagonal of outputs is not a linear operator"),
        (lambda b, x: ntk_operator(b, x, shift=float("nan")), "shift must be finite"),
        (lambda b, x: ntk_operator(b, x).matvec(x[:3]), "a vector for this operator must be (4,) or (4, M)"),
        (lambda b, x: ntk_operator(b, x, "full").diagonal(), "reduce the outputs"),
        (lambda b, x: gradient_gram(b, x, x), "x must be (N, S, d)"),
        (lambda b, x: gradient_gram(b, x[None], x[None]), "cotangents must be (1, 4, 3)"),
        (lambda b, x: gradient_gram(b, x[None], x[None, :, :3], form="fast"), "unknown form 'fast'"),
        (lambda b, x: gradient_norms(b, x[None], x[None, :, :3].log()), "cotangents has values that are not finite"),
        (lambda b, x: gradient_dots(b, x[None], x[None, :, :3], {"b_in": x}), "direction['b_in'] must be (1, 6)"),
        (
            lambda b, x: jvp(b, x, {}, backend="cuda"),
            "ntk_jvp: unknown backend 'cuda': use one of auto, torch, reference",
        ),
        (lambda b, x: ntk_vp(b, x, x[:, :3] / 0), "v has values that are not finite"),
        (lambda b, x: trace_ntk_vp(b, x, x[:, 0].log()), "v has values that are not finite"),
        (lambda b, x: trace_ntk_vp(b, x, x, "diagonal"), "the diagonal of outputs is not a linear operator"),
        (lambda b, x: ntk_vp(b, x, x[:, :3], metric=-torch.ones(6)), "metric must not be negative"),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(block(5, 6, 3, False), torch.randn(4, 5).double())
