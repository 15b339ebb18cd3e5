"""`fused_experts` against a sum written token by token, in every backend."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ffn_blocks import ACTIVATIONS
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import assert_rounding
from routed import (
    bounds_of,
    expert_by_expert,
    layer,
    results,
    routing,
    same,
    token_by_token,
    upstream,
)
from torch import Tensor

from fusion_kernels import experts_backend, fused_experts
from fusion_kernels.experts import loop_backend, reference
from fusion_kernels.experts.operators import EXPERTS
from fusion_kernels.ffn import FFN
from fusion_kernels.gates import PLAIN
from fusion_kernels.mlp.types import Needs

BACKENDS = ("loop", "grouped_mm")
#: What a backend is compared in, and how closely.
EXACT = {"loop": (torch.float64, 1e-10), "grouped_mm": (torch.float32, 2e-5)}


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize(
    ("gated", "bias", "scale"), [(True, False, True), (True, True, True), (False, True, True), (True, False, False)]
)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_outputs_and_gradients(backend: str, level: int, gated: bool, bias: bool, scale: bool, activation: str) -> None:
    T, k, E, d, h, d_out = 23, 2, 5, 8, 12, 4
    dtype, tolerance = EXACT[backend]
    p = layer(E, d, h, d_out, gated, bias, scale, dtype)
    x = torch.randn(T, d, dtype=dtype, requires_grad=True)
    index, weights = routing(T, k, E, dtype, skip=3)
    options: dict[str, Any] = {"activation": activation, "checkpoint_level": level, "backend": backend}
    found = results(fused_experts(x, index, weights, **p, **options), x, weights, p)
    expected = results(token_by_token(x, index, weights, activation, **p), x, weights, p)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert not bool(found["w_in"][3].any())


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 40),
    st.integers(1, 6),
    st.integers(1, 17),
    st.integers(1, 123),
    st.booleans(),
    st.sampled_from(sorted(ACTIVATIONS)),
)
def test_any_shape(T: int, E: int, d: int, h: int, gated: bool, activation: str) -> None:
    p = layer(E, d, h, 3, gated, True, True)
    x = torch.randn(T, d, dtype=torch.float64, requires_grad=True)
    index, weights = routing(T, min(2, E), E)
    y = fused_experts(x, index, weights, **p, activation=activation)
    found = results(y, x, weights, p)
    if T == 0:
        assert y.shape == (0, 3)
        assert not any(bool(found[name].any()) for name in p)
        return
    same(found, results(token_by_token(x, index, weights, activation, **p), x, weights, p), 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_elsewhere_contribute_nothing(backend: str) -> None:
    dtype, tolerance = EXACT[backend]
    p = layer(3, 8, 8, 8, True, True, True, dtype)
    x = torch.randn(9, 8, dtype=dtype, requires_grad=True)
    index, weights = routing(9, 2, 6, dtype)
    found = results(fused_experts(x, index, weights, **p, backend=backend), x, weights, p)
    expected = results(token_by_token(x, index, weights, "silu", **p), x, weights, p)
    same(found, expected, tolerance)
    assert bool((index >= 3).any())


def test_pinning_a_backend() -> None:
    p = layer(3, 8, 8, 8, True, False, False, torch.float64)
    x, index = torch.randn(4, 8, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.long)
    with experts_backend("grouped_mm"), pytest.raises(ValueError, match="grouped_mm takes float32"):
        fused_experts(x, index, torch.ones(4, 1).double(), **p)
    fused_experts(x, index, torch.ones(4, 1).double(), **p)
    with pytest.raises(ValueError, match="unknown backend 'quick': use one of auto, loop"), experts_backend("quick"):
        pass


def test_ids_below_zero_contribute_nothing() -> None:
    p = layer(3, 8, 8, 8, True, True, True)
    x = torch.randn(4, 8, dtype=torch.float64)
    index, weights = torch.tensor([[0, -1], [-1, -7], [2, 1], [-1, 1]]), torch.rand(4, 2, dtype=torch.float64)
    y = fused_experts(x, index, weights, **p)
    torch.testing.assert_close(y, fused_experts(x, torch.where(index < 0, 5, index), weights, **p))
    assert not bool(y[1].any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_gradients_of_many_rows_are_summed_in_float32(backend: str) -> None:
    p = layer(2, 8, 8, 8, True, True, False, torch.bfloat16)
    x = torch.randn(5000, 8).bfloat16()
    index = torch.arange(5000).remainder(2).unsqueeze(1)
    y = fused_experts(x, index, torch.ones(5000, 1).bfloat16(), **p, backend=backend)
    (found,) = torch.autograd.grad(y, p["b_out"], torch.ones_like(y))
    assert torch.equal(found, torch.full((2, 8), 2500.0).bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_errs_as_rounding_does(backend: str, dtype: torch.dtype) -> None:
    p = {name: t.detach().to(dtype) for name, t in layer(4, 64, 48, 64, True, False, True, torch.float32).items()}
    index, weights = routing(70, 2, 4, torch.float32)
    weights, x = weights.detach().to(dtype), torch.randn(70, 64).to(dtype)

    def run(function: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        q = {name: t.to(dtype, copy=True).requires_grad_() for name, t in p.items()}
        xs, ws = x.to(dtype, copy=True).requires_grad_(), weights.to(dtype, copy=True).requires_grad_()
        return results(function(xs, index, ws, **q), xs, ws, q)

    exact = run(functools.partial(token_by_token, activation="silu"), torch.float64)
    bounds = bounds_of(dtype, x, index, weights, upstream(exact["y"]), p)
    found = run(functools.partial(fused_experts, backend=backend), dtype)
    assert_rounding(found, exact, bounds, run(expert_by_expert, dtype))


def test_the_loop_says_what_a_graph_cannot_record(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu(Tensor):
        is_cuda = True  # type: ignore[assignment]

    ends = torch.tensor([2, 5]).as_subclass(OnGpu)
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    with pytest.raises(RuntimeError, match="CUDA graph cannot record: use experts_backend"):
        loop_backend._experts(ends)
    capturing = False
    assert list(loop_backend._experts(ends)) == [(0, slice(0, 2)), (1, slice(2, 5))]


def test_what_is_kept() -> None:
    p = layer(4, 8, 12, 8, True, False, True)
    x = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
    index, weights = routing(30, 2, 4)
    counts = {}
    for level in (0, 1, 2):
        shapes: list[tuple[int, ...]] = []

        def keep(t: Tensor, shapes: list[tuple[int, ...]] = shapes) -> Tensor:
            shapes.append(tuple(t.shape))
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            fused_experts(x, index, weights, **p, checkpoint_level=level)
        counts[level] = shapes.count((60, 12))
    assert counts == {0: 3, 1: 2, 2: 0}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_kept_of_tokens_does_not_grow_with_their_experts(backend: str, compiled: bool) -> None:
    """Bytes beside the arguments, of a backward that computes hidden tensors again; the rest is integers and y."""
    T, E, d = 40, 8, 16
    p, x = layer(E, d, 12, d, True, True, True, torch.float32), torch.randn(T, d, requires_grad=True)

    def kept(k: int, level: int, weighed: bool) -> int:
        index, weights = routing(T, k, E, torch.float32)
        weights.requires_grad_(weighed)
        found = {t.untyped_storage().data_ptr(): t for t in (x, weights, *p.values())}
        given = set(found)

        def keep(t: Tensor) -> Tensor:
            found[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            call(x, index, weights, **p, checkpoint_level=level, backend=backend)
        return sum(t.untyped_storage().nbytes() for at, t in found.items() if at not in given and t.is_floating_point())

    torch._dynamo.reset()
    call = torch.compile(fused_experts, fullgraph=True, backend="aot_eager") if compiled else fused_experts
    assert [kept(k, 2, False) for k in (1, 2, 8)] == [0, 0, 0]
    # The gradient of the weights needs the results; z and g are what level 1 keeps.
    assert [kept(k, 2, True) for k in (1, 2, 8)] == [4 * T * k * d for k in (1, 2, 8)]
    assert [kept(k, 1, False) for k in (1, 2, 8)] == [4 * T * k * 2 * 12 for k in (1, 2, 8)]


def test_gradients_of_gradients_and_transforms() -> None:
    p = layer(3, 3, 2, 2, True, True, True)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    index, weights = routing(5, 2, 3)
    names = list(p)

    def run(x: Tensor, weights: Tensor, *values: Tensor) -> Tensor:
        return fused_experts(x, index, weights, **dict(zip(names, values, strict=True)))

    assert torch.autograd.gradgradcheck(run, (x, weights, *p.values()))
    tangent = torch.randn_like(x)
    _, found = torch.func.jvp(lambda x: run(x, weights, *p.values()), (x.detach(),), (tangent,))
    y = run(x, weights, *p.values())
    u = torch.randn_like(y)
    (back,) = torch.autograd.grad(y, x, u)
    torch.testing.assert_close((found * u).sum(), (back * tangent).sum())
    of_many = torch.vmap(lambda x: run(x, weights, *p.values()))(torch.stack([x, tangent]))
    torch.testing.assert_close(of_many, torch.stack([y, run(tangent, weights, *p.values())]))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_every_time_and_compiled(backend: str) -> None:
    p = layer(4, 16, 16, 16, True, False, True, torch.float32)
    x = torch.randn(50, 16, requires_grad=True)
    index, weights = routing(50, 2, 4, torch.float32)
    first = results(fused_experts(x, index, weights, **p, backend=backend), x, weights, p)
    again = results(fused_experts(x, index, weights, **p, backend=backend), x, weights, p)
    compiled = torch.compile(
        lambda *a, **q: fused_experts(*a, **q, backend=backend), fullgraph=True, backend="aot_eager"
    )
    third = results(compiled(x, index, weights, **p), x, weights, p)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        torch.testing.assert_close(third[name], value)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_operators(backend: str, k: int) -> None:
    dtype, _ = EXACT[backend]
    p = layer(3, 4, 8, 4, True, True, True, dtype)
    x = torch.randn(7, 4, dtype=dtype, requires_grad=True)
    order, ends = torch.randperm(7 * k), torch.tensor([2, 2, 6 * k], dtype=torch.int32)
    blocks = FFN(**{**p, "w_out": p["w_out"].mT}, activation="silu").tensors
    arguments = (x, order, ends, *blocks, "silu", *PLAIN.arguments, 1, backend)
    torch.library.opcheck(torch.ops.fusion_kernels.experts.default, arguments)
    with torch.no_grad():
        _, z, g, a = torch.ops.fusion_kernels.experts(*arguments)
    detached = (t.detach() for t in (x, order, ends, *blocks))
    dy = torch.randn(7 * k, 4, dtype=dtype)
    torch.library.opcheck(
        torch.ops.fusion_kernels.experts_backward.default,
        (dy, *detached, z, g, a, "silu", *PLAIN.arguments, 1, backend, [True] * 8),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("T", "k", "ends"), [(9, 2, [4, 4, 17]), (5, 3, [0, 0, 0]), (7, 1, [1, 2, 7]), (0, 2, [0, 0, 0])]
)
def test_operators_as_the_reference(backend: str, T: int, k: int, ends: list[int]) -> None:
    """Choices in any order, experts without rows, rows without expert, none at all; results in the choices' order."""
    dtype, tolerance = EXACT[backend]
    p = layer(3, 4, 8, 12, True, True, True, dtype)
    ffn = FFN(**{**{n: t.detach() for n, t in p.items()}, "w_out": p["w_out"].detach().mT}, activation="silu")
    routed = torch.randn(T, 4, dtype=dtype), torch.randperm(T * k), torch.tensor(ends, dtype=torch.int32)
    dy, functions = torch.randn(T * k, 12, dtype=dtype), EXPERTS.functions(routed, ffn, 1, backend)
    needs = Needs(*[True] * 8)
    y, *kept = functions.forward(*routed, ffn, 1)
    found = {"y": y, **functions.backward(dy, *routed, ffn, tuple(kept), 1, needs)._asdict()}
    expected = {"y": reference.experts(*routed, ffn), **reference.experts_backward(dy, *routed, ffn, needs)._asdict()}
    same(found, expected, tolerance)
    assert found["x"].shape == (T, 4)


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(4, 3)}, r"x must be \(tokens, 8\) for this w_in, got \(4, 3\)"),
    (
        {"top_k_index": torch.zeros(3, 2, dtype=torch.long)},
        r"top_k_index must be int32 or int64 \(4, k\), got torch.int64 \(3, 2\)",
    ),
    ({"top_k_weights": torch.zeros(4, 1)}, r"top_k_weights must be \(4, 2\), got \(4, 1\)"),
    ({"top_k_index": torch.zeros(4, 2, dtype=torch.bool)}, r"top_k_index must be int32 or int64"),
    (
        {"w_gate": torch.zeros(3, 6, 8, dtype=torch.int8)},
        "w_gate must be float16, .*, got torch.int8",
    ),
    ({"w_in": torch.zeros(6, 8)}, r"w_in must be \(experts, h, d\)"),
    ({"scale": torch.ones(3, 5)}, r"scale must be \(3, 6\), got \(3, 5\)"),
    ({"b_gate": torch.ones(3, 6), "w_gate": None}, "b_gate is there without w_gate"),
    ({"activation": "tanh"}, "unknown activation 'tanh'"),
    ({"checkpoint_level": 5}, "checkpoint_level must be 0, 1 or 2, got 5"),
    ({"backend": "grouped_mm"}, r"not torch.float32 and \(6, 8, 8\): use backend='loop'"),
    ({"backend": "nothing"}, "unknown backend 'nothing': use one of auto, loop, grouped_mm, triton"),
]


@pytest.mark.parametrize(("change", "message"), ERRORS, ids=[e[1][:30] for e in ERRORS])
def test_errors(change: dict[str, Any], message: str) -> None:
    given_ = {
        "x": torch.zeros(4, 8), "top_k_index": torch.zeros(4, 2, dtype=torch.long), "top_k_weights": torch.ones(4, 2),
        "w_in": torch.zeros(3, 6, 8), "w_out": torch.zeros(3, 8, 6), "w_gate": torch.zeros(3, 6, 8),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        fused_experts(**(given_ | change))
