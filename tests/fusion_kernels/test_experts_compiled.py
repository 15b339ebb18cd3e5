"""`fused_experts` under `torch.compile`: grouped products are inline, and have the results of the operators."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from blocks import GATES
from rounding import assert_rounding
from routed import bounds_of, expert_by_expert, layer, results, routing, same, token_by_token, upstream
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fusion_kernels import Gate, fused_experts, split_gate_up
from fusion_kernels.experts import grouped_mm_backend, operators, reference
from fusion_kernels.experts.operators import EXPERTS
from fusion_kernels.ffn import FFN
from fusion_kernels.gates import PLAIN
from fusion_kernels.mlp.heuristics import Shape
from fusion_kernels.mlp.types import Needs

LOW, NODE, PRODUCT = torch.bfloat16, "fusion_kernels.experts", "aten._grouped_mm.default"
E, D, H, D_OUT = 5, 16, 24, 8


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class Unwritten(TorchDispatchMode):
    """Rows of products that belong to no expert are NaN, forward and backward: on a GPU they may be anything."""

    def __init__(self, beyond: int) -> None:
        super().__init__()
        self.beyond, self.seen = beyond, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._grouped_mm.default and args[0].ndim + args[1].ndim == 5:
            found[self.beyond :] = float("nan")
            self.seen += 1
        return found


# --- what a compiler gets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("T", "k", "ends"), [(9, 2, [4, 4, 17]), (5, 3, [0, 0, 0]), (7, 1, [1, 2, 7]), (0, 2, [0, 0, 0])]
)
@pytest.mark.parametrize(
    ("form", "bias", "scale"), [("plain", True, True), ("gated", False, False), *((gate, True, True) for gate in GATES)]
)
def test_composed_as_the_reference(T: int, k: int, ends: list[int], form: str, bias: bool, scale: bool) -> None:
    """Forward and by autograd, whatever products leave behind; the same bits every time, which are the operators'."""
    p = layer(3, 4, 8, 12, form != "plain", bias, scale, torch.float32)
    gating = GATES.get(form, PLAIN)
    x, order, last = torch.randn(T, 4, requires_grad=True), torch.randperm(T * k), torch.tensor(ends, dtype=torch.int32)
    dy, needs = torch.randn(T * k, 12), Needs(True, *[True] * 7)

    def block(p: dict[str, Tensor]) -> FFN:
        return FFN(**{**p, "w_out": p["w_out"].mT}, activation="silu", gating=gating)  # type: ignore[arg-type]

    def run() -> dict[str, Tensor]:
        with Unwritten(ends[-1]) as products:
            y = grouped_mm_backend.composed(x, order, last, block(p))
            found = dict(zip(("x", *p), torch.autograd.grad(y, [x, *p.values()], dy), strict=True))
        assert products.seen >= (6 if form != "plain" else 4)
        return {"y": y.detach(), **found}

    found, again = run(), run()
    wide = x.detach().double(), order, last, block({name: t.detach().double() for name, t in p.items()})
    exact = reference.experts_backward(dy.double(), *wide, needs)._asdict() | {"y": reference.experts(*wide)}
    exact = {name: t if name != "w_out" else t.mT for name, t in exact.items() if t is not None}
    same({name: t.double() for name, t in found.items()}, exact, 2e-5)
    assert all(torch.equal(t, again[name]) for name, t in found.items())


def test_what_is_added_up_is_added_in_float32_and_in_order() -> None:
    """No gradient is left to index_add or index_put, which add in any order, and in the dtype of what they add to."""
    p = layer(2, 8, 8, 8, True, True, False, LOW)
    x, order = torch.randn(2500, 8).to(LOW).requires_grad_(), torch.randperm(5000)
    ffn = FFN(**{**p, "w_out": p["w_out"].mT}, activation="silu")  # type: ignore[arg-type]
    seen: set[str] = set()

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(str(func))
            return func(*args, **(kwargs or {}))

    with Look():
        y = grouped_mm_backend.composed(x, order, torch.tensor([2500, 5000]), ffn)
        found, *_ = torch.autograd.grad(y, [p["b_out"], x, *p.values()], torch.ones_like(y))
    assert torch.equal(found, torch.full((2, 8), 2500.0, dtype=LOW))
    assert "aten.segment_reduce.default" in seen
    assert not any("index_add" in name or "index_put" in name or "scatter" in name for name in seen)


# --- compiled --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Case:
    """A layer and tokens, of which some are routed to experts that are not here."""

    x: Tensor
    index: Tensor
    weights: Tensor
    p: dict[str, Tensor]
    gating: Gate = PLAIN
    seen: str = ""

    @classmethod
    def of(cls, T: int = 23, k: int = 2, gate: str = "gated", bias: bool = True, dtype: torch.dtype = LOW) -> Case:
        p = layer(E, D, H, D_OUT, gate != "plain", bias, True, dtype)
        index, weights = routing(T, k, E + 2, dtype)
        return cls(torch.randn(T, D).to(dtype).requires_grad_(), index, weights, p, GATES.get(gate, PLAIN))

    def run(self, function: Callable[..., Tensor], **options: Any) -> dict[str, Tensor]:
        y = function(self.x, self.index, self.weights, **self.p, gating=self.gating, **options)
        asked = {name: t for name, t in {"x": self.x, "weights": self.weights, **self.p}.items() if t.requires_grad}
        return {
            "y": y.detach(),
            **dict(zip(asked, torch.autograd.grad(y, list(asked.values()), upstream(y)), strict=True)),
        }

    def compiled(self, **options: Any) -> dict[str, Tensor]:
        """Results through a compiler; what it saw of them, forward and backward, is `seen`."""

        def look(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            self.seen += graph.print_readable(print_output=False)
            return graph

        backend = aot_autograd(fw_compiler=look, bw_compiler=look)
        return self.run(torch.compile(fused_experts, fullgraph=True, backend=backend), **options)


@pytest.mark.parametrize(
    ("gate", "bias", "k"), [("gated", True, 2), ("plain", True, 3), ("both", False, 1), ("after", True, 2)]
)
def test_grouped_products_are_inlined(gate: str, bias: bool, k: int) -> None:
    case = Case.of(k=k, gate=gate, bias=bias)
    found = case.compiled(backend="grouped_mm")
    assert NODE not in case.seen
    assert case.seen.count(PRODUCT) == (6 if gate == "plain" else 9)
    assert bool((case.index >= E).any())
    same(found, case.run(fused_experts, backend="grouped_mm"), 0)


@pytest.mark.parametrize(
    ("dtype", "backend"), [(torch.float32, "grouped_mm"), (torch.float16, "grouped_mm"), (LOW, "loop"), (LOW, "auto")]
)
def test_all_else_stays_one_node(dtype: torch.dtype, backend: str) -> None:
    """Compilers know no grouped products of other dtypes, and no loop."""
    case = Case.of(dtype=dtype)
    found = case.compiled(backend=backend)
    assert PRODUCT not in case.seen
    assert [case.seen.count(f"{NODE}{way}.default") for way in ("", "_backward")] == [1, 1]
    same(found, case.run(fused_experts, backend=backend), 0)


def test_sizes_that_do_not_fit_are_refused_as_without_a_compiler() -> None:
    case = Case.of()
    case.p = layer(E, D, 12, D_OUT, True, True, True, LOW)
    with pytest.raises(ValueError, match="use backend='loop'"):
        case.compiled(backend="grouped_mm")


def test_only_gradients_that_are_asked_for_are_computed() -> None:
    case = Case.of()
    for name, t in {"x": case.x, "weights": case.weights, **case.p}.items():
        t.requires_grad_(name == "w_gate")
    case.run(fused_experts, backend="grouped_mm")
    case.compiled(backend="grouped_mm")
    assert case.seen.count(PRODUCT) == 5  # three forward; dA and dW_gate
    assert "segment_reduce" not in case.seen


def test_a_trace_goes_by_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU that has one launch for all experts; of known rows, every choice of a token counts as one."""
    known: list[tuple[int, str]] = []
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(EXPERTS.choice, "known_rows", lambda *about: asked.append(about) or known)
    # What a compiler would stumble over, were it not told that the answer is a constant.
    monkeypatch.setattr(operators, "capability", torch._dynamo.disable(lambda device: (9, 0)))
    monkeypatch.setattr(EXPERTS, "_traced", lambda rows, ffn, level, backend: EXPERTS.choice.traced(rows, ffn, level))

    def inlined(T: int, dtype: torch.dtype = LOW, **options: Any) -> bool:
        torch._dynamo.reset()
        case = Case.of(T, 3, dtype=dtype)
        case.compiled(**options)
        return PRODUCT in case.seen

    assert inlined(21)
    assert asked == [(torch.device("cpu"), LOW, Shape(0, D, H, D_OUT, True, 1, E), "silu", "grouped_mm")]
    assert not inlined(21, torch.float32)
    known[:] = [(64, "loop")]
    assert [inlined(T) for T in (21, 22)] == [True, False]


def test_any_number_of_tokens_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths and levels are symbols too, of which the choice needs the values."""
    monkeypatch.setattr(operators, "capability", torch._dynamo.disable(lambda device: (9, 0)))
    monkeypatch.setattr(EXPERTS, "_traced", lambda rows, ffn, level, backend: EXPERTS.choice.traced(rows, ffn, level))
    compiled = torch.compile(fused_experts, fullgraph=True, dynamic=True, backend="aot_eager")
    Case.of(30).run(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for T in (3, 17, 123):
            case = Case.of(T)
            same(case.run(compiled), case.run(fused_experts, backend="grouped_mm"), 0)
    none = Case.of(0)
    same(none.run(compiled), none.run(fused_experts, backend="grouped_mm"), 0)


def test_what_is_kept_of_tokens_does_not_grow_with_their_experts() -> None:
    """A compiler that was not told would keep the rows that products read."""

    def kept(k: int) -> list[tuple[int, ...]]:
        case, shapes = Case.of(k=k), list[tuple[int, ...]]()
        torch._dynamo.reset()
        compiled = torch.compile(fused_experts, fullgraph=True, backend="aot_eager_decomp_partition")
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
            case.run(compiled, backend="grouped_mm")
        return [shape for shape in shapes if shape[1:] == (D,)]

    assert kept(1) == kept(3) == [(23, D)]


def test_under_autocast_and_within_a_checkpoint() -> None:
    case = Case.of(dtype=torch.float32)

    def checkpointed(*tensors: Tensor, **options: Any) -> Tensor:
        found: Tensor = checkpoint(lambda *given: fused_experts(*given, **options), *tensors, use_reentrant=False)
        return found

    with torch.autocast("cpu", LOW):
        expected = case.run(fused_experts, backend="grouped_mm")
        same(case.compiled(backend="grouped_mm"), expected, 0)
        assert NODE not in case.seen
        same(
            case.run(torch.compile(checkpointed, fullgraph=True, backend="aot_eager"), backend="grouped_mm"),
            expected,
            0,
        )


class Layer(torch.nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.names = tuple(case.p)
        for name, t in case.p.items():
            self.register_parameter(name, torch.nn.Parameter(t.detach()))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        p = {name: getattr(self, name) for name in self.names}
        return fused_experts(x, index, weights, **p, backend="grouped_mm")


def test_exported_as_one_node() -> None:
    case = Case.of()
    routed, module = (case.x.detach(), case.index, case.weights.detach()), Layer(case)
    for strict in (True, False):
        program = torch.export.export(module, routed, strict=strict)
        assert f"{NODE}.default" in program.graph_module.print_readable(print_output=False)
        assert torch.equal(program.module()(*routed), module(*routed))


@pytest.mark.parametrize("inline", [False, True])
def test_gates_that_alternate_with_ups(inline: bool) -> None:
    """As some models store them, input by input: views with no contiguous axis, which the products refuse."""
    case = Case.of(bias=False)
    both = torch.stack([case.p["w_gate"].detach(), case.p["w_in"].detach()], 3).transpose(1, 2).flatten(2)
    gate, up = (t.transpose(0, 1) for t in split_gate_up(both.permute(2, 0, 1), "interleaved"))
    assert 1 not in up.stride()[1:]
    expected = case.run(fused_experts, backend="grouped_mm")
    case.p = {**case.p, "w_gate": gate.requires_grad_(), "w_in": up.requires_grad_()}
    same(case.compiled(backend="grouped_mm") if inline else case.run(fused_experts, backend="grouped_mm"), expected, 0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="Inductor needs a C++ compiler")
def test_inductor_errs_as_rounding_does() -> None:
    p = {name: t.detach().to(LOW) for name, t in layer(4, 64, 48, 64, True, False, True, torch.float32).items()}
    (index, weights), x = routing(70, 2, 4, torch.float32), torch.randn(70, 64).to(LOW)
    weights = weights.detach().to(LOW)
    compiled = torch.compile(fused_experts, fullgraph=True)

    def run(function: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        q = {name: t.to(dtype, copy=True).requires_grad_() for name, t in p.items()}
        xs, ws = x.to(dtype, copy=True).requires_grad_(), weights.to(dtype, copy=True).requires_grad_()
        return results(function(xs, index, ws, **q), xs, ws, q)

    exact = run(functools.partial(token_by_token, activation="silu"), torch.float64)
    found = run(functools.partial(compiled, backend="grouped_mm"), LOW)
    assert_rounding(
        found, exact, bounds_of(LOW, x, index, weights, upstream(exact["y"]), p), run(expert_by_expert, LOW)
    )
