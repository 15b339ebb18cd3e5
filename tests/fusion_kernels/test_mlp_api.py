"""`fused_mlp` and `fused_glu_mlp` inside torch: compilers, autocast, transforms, higher derivatives, bad input."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from blocks import MLPCall, make_block
from rounding import assert_rounding
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fusion_kernels import BackendUnavailableError, fused_mlp, mlp_backend, native
from fusion_kernels.ffn import FFN
from fusion_kernels.gates import PLAIN
from fusion_kernels.mlp import reference_backend, torch_backend
from fusion_kernels.mlp.folding import with_one_factor
from fusion_kernels.mlp.operators import MLP
from fusion_kernels.mlp.types import Needs

DEFAULT = "torch" if native.UNAVAILABLE else "cpu"
GATED = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


def order(block: MLPCall) -> tuple[Tensor | None, ...]:
    return (block.x, *block.ffn.tensors)


def assert_same(found: dict[str, Tensor], ideal: dict[str, Tensor], **tolerance: float) -> None:
    assert set(found) == set(ideal)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, ideal[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


@pytest.mark.parametrize(("level", "gated"), [(0, True), (1, False), (2, True)])
def test_opcheck(level: int, gated: bool) -> None:
    block = make_block(5, gated=gated, scale=("both", "float", "int")[level]).training()
    torch.library.opcheck(MLP.forward_operator.overload, (*order(block), "gelu", *PLAIN.arguments, level, "auto"))
    bare = make_block(5, gated=gated, bias=False, scale=None, dtype=torch.float32)
    torch.library.opcheck(MLP.forward_operator.overload, (*order(bare), "silu", *PLAIN.arguments, level, "torch"))


@pytest.mark.slow
@pytest.mark.parametrize(("level", "gated"), [(0, True), (1, False), (2, True)])
def test_opcheck_backward(level: int, gated: bool) -> None:
    block = make_block(5, gated=gated, scale="both" if level == 1 else "float").training()
    with torch.no_grad():
        _, z, g, a = MLP.forward_operator.overload(*order(block), "gelu", *PLAIN.arguments, level, "auto")
    needs = [t is not None for t in order(block)]
    dy = block.dy.requires_grad_()
    torch.library.opcheck(
        MLP.backward_operator.overload, (dy, *order(block), z, g, a, "gelu", *PLAIN.arguments, level, "auto", needs)
    )
    frozen = [True, False, *(False for _ in needs[2:])]
    torch.library.opcheck(
        MLP.backward_operator.overload, (dy, *order(block), z, g, a, "gelu", *PLAIN.arguments, level, "auto", frozen)
    )


@pytest.mark.slow
@pytest.mark.parametrize(("level", "gated"), [(0, False), (1, True), (2, False)])
def test_compiles_once_for_every_number_of_tokens(level: int, gated: bool) -> None:
    block = make_block(2, 3, gated=gated, dtype=torch.float32).training()
    frames = 0

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        nonlocal frames
        frames += 1
        return graph.forward

    torch._dynamo.reset()
    counted = torch.compile(lambda b, level: b.fused(level), fullgraph=True, dynamic=True, backend=count)
    compiled = torch.compile(lambda b, level: b.fused(level), fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 3), (4, 9), (5, 33), (7, 6)):
        x, dy = torch.randn(*shape, 12, requires_grad=True), torch.randn(*shape, 7)
        this = replace(block, x=x, dy=dy)
        counted(this, level)
        assert_same(this.gradients(compiled(this, level)), this.gradients(this.fused(level)))
    assert frames == 1


def test_the_compiled_graph_is_one_node_each_way() -> None:
    block = make_block(40, dtype=torch.float32).training()
    graphs: list[str] = []

    def look(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph.print_readable(print_output=False))
        return graph

    torch._dynamo.reset()
    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=look, bw_compiler=look)
    y = torch.compile(block.fused, fullgraph=True, backend=backend)()
    block.gradients(y)
    assert len(graphs) == 2
    assert graphs[0].count("fusion_kernels.mlp.default") == 1
    assert graphs[1].count("fusion_kernels.mlp_backward.default") == 1
    assert "aten.mm" not in graphs[0] + graphs[1]


@GATED
@pytest.mark.parametrize("compiled", [False, True], ids=["direct", "compiled"])
@pytest.mark.parametrize("tokens", [3, 50])
def test_autocast(gated: bool, compiled: bool, tokens: int) -> None:
    """float32 masters under autocast: what runs, and how gradients come back."""
    block = make_block(tokens, gated=gated, dtype=torch.float32).training()
    low = replace(block.to(torch.bfloat16), dy=block.dy.bfloat16())
    for name in ("w_in", "w_gate", "w_out", "b_in", "b_gate", "b_out", "scale"):
        setattr(low, name, getattr(block, name))
    torch._dynamo.reset()
    run = torch.compile(block.fused, fullgraph=True, backend="aot_eager") if compiled else block.fused
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, low.training().fused(1, "auto" if tokens == 3 and not compiled else DEFAULT))
    block.dy = block.dy.bfloat16()
    found = block.gradients(y)
    for name, t in block.leaves().items():
        assert found[name].dtype == t.dtype
    # Of what autocast makes of the masters; the scale is the same in bfloat16.
    cast = replace(block, dy=block.dy.float()).to(torch.bfloat16)
    exact = cast.to(torch.float64).training()
    ideal, bounds = exact.gradients(exact.eager()), cast.bounds(torch.bfloat16)
    assert_rounding(found, ideal, {name: bounds[name] for name in ideal})
    for name in ("x", "w_in", "w_out"):
        assert float((found[name] - ideal[name]).norm() / ideal[name].norm()) < 0.02, name


def test_autocast_does_not_reach_a_backward_of_float32() -> None:
    block = make_block(40, dtype=torch.float32).training()
    ideal = block.gradients(block.fused(1, "torch"))
    y = block.fused(1, "torch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = block.gradients(y)
    for name, gradient in found.items():
        assert torch.equal(gradient, ideal[name])
    wide = make_block(40).training()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert wide.fused().dtype == torch.float64


@GATED
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize(("activation", "scale"), [("gelu", "float"), ("silu", "float"), ("gelu", "both")])
def test_higher_derivatives(activation: str, scale: str, tokens: int, gated: bool) -> None:
    block = make_block(tokens, d=3, h=4, d_out=2, gated=gated, activation=activation, scale=scale).training()

    def second(y: Tensor) -> dict[str, Tensor]:
        leaves = block.leaves()
        first = torch.autograd.grad(y, list(leaves.values()), block.dy, create_graph=True)
        total = torch.stack([t.square().sum() for t in first]).sum()
        # b_out shifts y and changes no gradient.
        again = torch.autograd.grad(total, [*leaves.values(), block.dy], create_graph=True, allow_unused=True)
        named = {name: t for name, t in zip([*leaves, "dy"], again, strict=True) if t is not None}
        third = torch.autograd.grad(named["w_in"].square().sum(), list(leaves.values()), allow_unused=True)
        return {**named, **{f"third {n}": t for n, t in zip(leaves, third, strict=True) if t is not None}}

    block.dy.requires_grad_()
    ideal = second(block.eager())
    for level in (0, 1, 2):
        assert_same(second(block.fused(level, "torch")), ideal)
        assert_same(
            second(MLP.forward_operator.overload(*order(block), activation, *PLAIN.arguments, level, "auto")[0]), ideal
        )
    assert_same(second(block.fused()), ideal)


@GATED
def test_double_backward_with_frozen_tensors(gated: bool) -> None:
    block = make_block(40, gated=gated).training()
    block.w_in.requires_grad_(False)
    block.x.requires_grad_(False)

    def second(y: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(y, block.w_out, block.dy, create_graph=True)
        return torch.autograd.grad(first.square().sum(), block.b_in)[0]  # type: ignore[arg-type]

    torch.testing.assert_close(second(block.fused()), second(block.eager()))


@GATED
@pytest.mark.parametrize("scale", ["int", "both"])
def test_function_transforms(scale: str, gated: bool) -> None:
    block = make_block(3, 4, gated=gated, scale=scale)
    w = block.w_out
    loss = lambda b, w: replace(b, w_out=w).fused().square().sum()  # noqa: E731
    eager = lambda b, w: replace(b, w_out=w).eager().square().sum()  # noqa: E731
    torch.testing.assert_close(grad(lambda w: loss(block, w))(w), grad(lambda w: eager(block, w))(w))
    torch.testing.assert_close(hessian(lambda w: loss(block, w))(w), hessian(lambda w: eager(block, w))(w))
    torch.testing.assert_close(
        jacrev(lambda w: replace(block, w_out=w).fused())(w), jacrev(lambda w: replace(block, w_out=w).eager())(w)
    )
    per_sample = vmap(grad(lambda w, x: loss(replace(block, x=x), w)), (None, 0))(w, block.x)
    for i, x in enumerate(block.x):
        torch.testing.assert_close(per_sample[i], grad(lambda w, x=x: eager(replace(block, x=x), w))(w))
    several = torch.stack([w, 2 * w])
    torch.testing.assert_close(
        vmap(lambda w: replace(block, w_out=w).fused())(several)[1], replace(block, w_out=2 * w).eager()
    )
    tangent = torch.randn_like(block.x)
    _, found = jvp(lambda x: replace(block, x=x).fused(), (block.x,), (tangent,))
    _, ideal = jvp(lambda x: replace(block, x=x).eager(), (block.x,), (tangent,))
    torch.testing.assert_close(found, ideal)
    with forward_ad.dual_level():
        dual = replace(block, x=forward_ad.make_dual(block.x, tangent)).fused()
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, ideal)


def test_function_transforms_inside_a_compiler() -> None:
    block = make_block(3, dtype=torch.float32)
    torch._dynamo.reset()
    f = grad(lambda w: replace(block, w_out=w).fused().square().sum())
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(block.w_out), f(block.w_out))


class Layer(torch.nn.Module):
    """A module around the function, for the wrappers that take modules."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(6, 5), torch.nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return fused_mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    torch.manual_seed(0)
    layer = Layer()
    x = torch.randn(50, 6, requires_grad=True)
    found = [checkpoint(layer, x, use_reentrant=reentrant), layer(x)]
    gradients = []
    for y in found:
        layer.zero_grad()
        y.sum().backward()
        gradients.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(functional_call(layer, dict(layer.named_parameters()), (x,)), layer(x))


def test_gradients_accumulate() -> None:
    layer = Layer()
    xs = [torch.randn(40, 6) for _ in range(2)]
    torch.cat([layer(x) for x in xs]).sum().backward()
    together = [p.grad for p in layer.parameters()]
    layer.zero_grad(set_to_none=True)
    for x in xs:
        layer(x).sum().backward()
    for p, expected in zip(layer.parameters(), together, strict=True):
        torch.testing.assert_close(p.grad, expected)


def test_dispatch_modes_see_the_operator() -> None:
    seen: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    block = make_block(50).training()
    with Watch():
        block.gradients(block.fused())
    assert seen.count("fusion_kernels.mlp.default") == 1
    assert seen.count("fusion_kernels.mlp_backward.default") == 1
    with FlopCounterMode(display=False):
        torch.testing.assert_close(block.fused(), block.eager())


@pytest.mark.slow
def test_pinning_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    block = make_block(40)
    ran: list[str] = []

    def noting(name: str, function: Any) -> Any:
        return lambda *a: (ran.append(name), function(*a))[1]

    noted = {name: f._replace(output=noting(name, f.output)) for name, f in MLP._functions.items()}
    monkeypatch.setattr(MLP, "_functions", noted)
    block.fused()
    with mlp_backend("reference"):
        block.fused()
        with mlp_backend("torch"):
            block.fused()
        block.fused()
        block.fused(backend="torch")
    block.fused()
    assert ran == [DEFAULT, "reference", "torch", "reference", "torch", DEFAULT]
    with pytest.raises(ValueError, match="unknown backend 'quick': use one of auto, "), mlp_backend("quick"):
        pass
    code = "from fusion_kernels import mlp_backend; print(mlp_backend.name)"
    printed = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(sys.path), "FUSION_KERNELS_MLP_BACKEND": "reference"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout.strip() == "reference"


@pytest.mark.parametrize("name", ["cublas", "epilogue", "resident"])
def test_backends_of_other_devices_are_refused(name: str) -> None:
    with pytest.raises(BackendUnavailableError, match=f"mlp: backend '{name}'"):
        make_block(3).fused(backend=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "tanh"}, "unknown activation 'tanh'"),
        ({"level": 3}, "checkpoint_level must be 0, 1 or 2, got 3"),
        ({"backend": "fortran"}, "mlp: unknown backend 'fortran': use one of auto, cpu, torch, reference"),
        ({"x": torch.zeros(3, 11)}, "x must be (..., 12) for this w1, got (3, 11)"),
        ({"x": torch.zeros(())}, "x must be (..., 12) for this w1, got ()"),
        (
            {"x": torch.zeros(3, 12, dtype=torch.int64)},
            "x must be float16, bfloat16, float32 or float64, got torch.int64",
        ),
        ({"x": torch.zeros(3, 12, device="meta")}, "w1 is on cpu, x is on meta"),
        ({"w_in": torch.zeros(9)}, "w1 must be a matrix, got (9,)"),
        ({"w_in": torch.zeros(9, 12, dtype=torch.int8)}, "w1 must be float16"),
        ({"w_out": torch.zeros(7, 8)}, "w2 must be (7, 9), got (7, 8)"),
        ({"w_out": torch.zeros(7)}, "w2 must be a matrix, got (7,)"),
        ({"b_in": torch.zeros(7)}, "b1 must be (9,), got (7,)"),
        ({"b_out": torch.zeros(9)}, "b2 must be (7,), got (9,)"),
        ({"scale": torch.zeros(9, 1)}, "scale must be (9,), got (9, 1)"),
        (
            {"scale": torch.zeros(9, dtype=torch.bool)},
            "scale must have a floating-point or integer dtype, got torch.bool",
        ),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], message: str) -> None:
    call = {"level": changes.pop("level", 1), "backend": changes.pop("backend", "auto")}
    with pytest.raises(ValueError, match="^" + re.escape(message)) as error:
        replace(make_block(3), **changes).fused(**call)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w_gate": torch.zeros(8, 12)}, "w_gate must be (9, 12), got (8, 12)"),
        ({"b_gate": torch.zeros(8)}, "b_gate must be (9,), got (8,)"),
        ({"b_out": torch.zeros(8)}, "b_down must be (7,), got (8,)"),
        ({"w_out": torch.zeros(7, 4)}, "w_down must be (7, 9), got (7, 4)"),
    ],
)
def test_bad_gated_input_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        replace(make_block(3, gated=True), **changes).fused()


def test_mixed_dtypes_of_weights_are_fine() -> None:
    block = make_block(40, dtype=torch.float32)
    mixed = replace(
        block, w_out=block.w_out.double(), b_in=None if block.b_in is None else block.b_in.bfloat16()
    ).training()
    y = mixed.fused()
    assert y.dtype == torch.float32
    assert {name: t.dtype for name, t in mixed.gradients(y).items()} == {n: t.dtype for n, t in mixed.leaves().items()}
    rounded = replace(block, b_in=None if block.b_in is None else block.b_in.bfloat16().float())
    torch.testing.assert_close(y, rounded.eager())


class OnGpu:
    """As much of a tensor on a GPU as the choice of a path looks at."""

    device, dtype, is_cuda = torch.device("cuda", 1), torch.bfloat16, True

    def __init__(self, *shape: int) -> None:
        self.shape = shape


def test_the_dispatcher_asks_for_the_choice_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(MLP, "choice", lambda *call: asked.append(call) or "epilogue")
    x, w_in, w_out = OnGpu(5, 6), OnGpu(7, 6), OnGpu(7, 8)
    block = (x, w_in, w_out, None, None, None, None, None)
    for level in (0, 2):
        how = ("gelu", *PLAIN.arguments, level, "auto")
        assert MLP.forward_operator.choose(*block, *how) == "epilogue"
        assert MLP.backward_operator.choose(x, *block, None, None, None, *how, [True] * 8) == "epilogue"
        assert [(rows, ffn.w_out, at) for rows, ffn, at in asked] == [((x,), w_out, level)] * 2
        asked.clear()
    # A name, from the caller or a pin, is not for the choice to judge.
    assert MLP.forward_operator.choose(*block, "gelu", *PLAIN.arguments, 1, "cublas") == "cublas"
    assert not asked


@pytest.mark.parametrize("tokens", [0, 1, 32, 33])
def test_any_number_of_tokens_trains_through_the_backend(tokens: int) -> None:
    with mlp_backend("auto"):
        assert "_Direct" in type(make_block(tokens).training().fused().grad_fn).__name__


@GATED
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_a_factor_before_the_activation_is_folded_for_backends_without_one(bias: bool, level: int, gated: bool) -> None:
    def one_factor(function: Any) -> Any:
        def checked(*arguments: Any) -> Any:
            (folded,) = (argument for argument in arguments if isinstance(argument, FFN))
            assert folded.scale is not None
            assert folded.scale.ndim == 1
            return function(*arguments)

        return checked

    block = make_block(9, gated=gated, bias=bias, scale="both").training()
    x, record = block.x, block.ffn
    ideal = block.gradients(block.eager())
    with torch.no_grad():
        forward, backward = with_one_factor(one_factor(reference_backend.forward), one_factor(torch_backend.backward))
        y, *kept = forward(x, record, level)
        torch.testing.assert_close(y, block.eager())
        for frozen in (set(), {"scale"}, {"w_in", "w_gate", "b_in"}):
            given = zip(Needs._fields, order(block), strict=True)
            needs = Needs(*(t is not None and name not in frozen for name, t in given))
            found = backward(block.dy, x, record, kept, level, needs)
            for name, need, gradient in zip(Needs._fields, needs, found, strict=True):
                assert (gradient is not None) == need, name
                if need:
                    expected = ideal[name].mT if name == "w_out" else ideal[name]
                    torch.testing.assert_close(gradient, expected)
