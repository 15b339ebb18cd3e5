"""Fused modules in ordinary training code: through the fused operators and through their children, with the same
results, under compilation, autocast, checkpointing, accumulation, replicas and shards."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fused_forms
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from rounding import MANY, RATIO
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import parallel
from bundles import random_bundle
from fusion_kernels import mlp_backend, native
from mlp_fusion import FusedGLU, FusedMLP
from mlp_fusion.modules import FusedFFN, ffn, layouts

pytestmark = pytest.mark.slow

FORMS = ("folded", "scaled", "split")
BACKEND = "torch" if native.UNAVAILABLE else "cpu"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """What is said once is said anew in every test; a backend is pinned, or the few tokens here would not see one."""
    ffn._say_once.cache_clear()
    with mlp_backend(BACKEND):
        yield
    ffn._say_once.cache_clear()


def build(gated: bool, form: str = "scaled", kind: type[nn.Module] = nn.Linear, **options: Any) -> FusedFFN:
    cls = FusedGLU if gated else FusedMLP
    return cls.from_bundle(random_bundle(width=17, gated=gated, scale=True, **options), form, kind=kind)


def through_children(module: FusedFFN) -> FusedFFN:
    """A copy whose children have to be called: hooks that change nothing hang on them."""
    other = copy.deepcopy(module)
    for role in other.ROLES:
        other.projection(role).register_forward_hook(lambda *_: None)
    return other


def gradients(module: FusedFFN, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    y.square().sum().backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **found}


def same(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        torch.testing.assert_close(value, expected[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


# --- the operators and the children agree ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("gated", "kind"), [(False, nn.Linear), (False, Conv1D), (True, nn.Linear)])
@pytest.mark.parametrize("bias", [True, False])
def test_operators_and_children_agree(gated: bool, kind: type[nn.Module], form: str, bias: bool) -> None:
    module = build(gated, form, kind, bias=bias)
    if module.scale is not None:
        scale = nn.Parameter(module.scale)
        del module.scale
        module.register_parameter("scale", scale)
    x = torch.randn(2, 9, 5, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gradients(module, x)
    with pytest.warns(UserWarning, match="a fused FFN holds a projection with hooks"):
        expected = gradients(through_children(module), x)
    same(found, expected, rtol=1e-9, atol=1e-9)


def saved_shapes(module: FusedFFN, x: Tensor) -> tuple[Tensor, list[tuple[int, ...]]]:
    """The output, and the shapes of the tensors that are kept for the backward."""
    shapes: list[tuple[int, ...]] = []

    def keep(t: Tensor) -> Tensor:
        shapes.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        return module(x), shapes


@pytest.mark.parametrize("gated", [False, True])
def test_levels_change_memory_and_not_gradients(gated: bool) -> None:
    module = build(gated)
    x = torch.randn(40, 5, dtype=torch.float64)
    hidden: dict[int, int] = {}
    found: dict[int, dict[str, Tensor]] = {}
    for level in (0, 1, 2):
        module.checkpoint_level = level
        module.zero_grad()
        y, shapes = saved_shapes(module, x.requires_grad_())
        y.square().sum().backward()
        hidden[level] = shapes.count((40, 17))
        found[level] = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    assert hidden == ({0: 3, 1: 2, 2: 0} if gated else {0: 2, 1: 1, 2: 0})
    for level in (1, 2):
        same(found[level], found[0], rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert not module(x).requires_grad


def test_levels_are_checked() -> None:
    with pytest.raises(ValueError, match="checkpoint_level must be 0, 1 or 2, got 3"):
        FusedMLP.from_mlp(nn.Linear(3, 4), nn.Linear(4, 3), checkpoint_level=3)
    assert FusedMLP.from_mlp(nn.Linear(3, 4), nn.Linear(4, 3), checkpoint_level=2).checkpoint_level == 2
    assert "checkpoint_level=2" in repr(FusedMLP.from_mlp(nn.Linear(3, 4), nn.Linear(4, 3), checkpoint_level=2))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gated", [False, True])
def test_any_number_of_tokens_goes_to_the_operator(gated: bool, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = build(gated, form, d=40, dtype=torch.float32)
    monkeypatch.setattr(ffn, "obstacle", lambda _: None)
    for role in module.ROLES:
        monkeypatch.setattr(module.projection(role), "forward", lambda _: pytest.fail("a child was called"))
    with mlp_backend("auto"):
        for tokens, gradients_on in itertools.product((0, 1, 32, 33, 300), (True, False)):
            x = torch.randn(tokens, 40)
            with torch.set_grad_enabled(gradients_on):
                y = module(x)
            torch.testing.assert_close(y, module.as_bundle().forward(x)[0], rtol=1e-4, atol=1e-4)


def test_kept_powers_of_the_scale_serve_every_mode() -> None:
    module = build(False, "split", dtype=torch.float32)
    x = torch.randn(40, 5)
    with torch.inference_mode():
        inferred = module(x)
    trained = module(x)
    trained.sum().backward()
    assert torch.equal(inferred, trained.detach())
    assert module._kept is not None
    assert copy.deepcopy(module)._kept is None
    with torch.inference_mode():
        module.scale = torch.full((17,), 2.0)
        inferred = module(x)
    trained = torch.func.functional_call(module, {"scale": torch.full((17,), 2.0, requires_grad=True)}, (x,))
    torch.testing.assert_close(inferred, trained)
    assert trained.grad_fn is not None


def test_scale_may_be_written_to_in_any_way() -> None:
    module = build(False, "split", dtype=torch.float32)
    x = torch.randn(4, 5)

    def agrees() -> bool:
        return torch.allclose(module(x), module.as_bundle().forward(x)[0], atol=1e-4)

    assert module.scale is not None
    assert agrees()
    module.scale.data.mul_(4)
    assert agrees()
    with torch.no_grad():
        module.scale.add_(1)
    assert agrees()
    module.scale = torch.full((17,), 3.0)
    assert agrees()


@pytest.mark.parametrize("tokens", [4, 400])
def test_another_dtype_is_refused_as_by_a_linear_layer(tokens: int) -> None:
    module = build(False, dtype=torch.bfloat16)
    with mlp_backend("auto"), pytest.raises(RuntimeError, match="same dtype"):
        module(torch.randn(tokens, 5))


@pytest.mark.parametrize("form", FORMS)
def test_exported_as_one_node_and_traced_as_plain_layers(form: str) -> None:
    module, x = build(True, form, dtype=torch.float32).eval(), torch.randn(300, 5)
    for strict in (True, False):
        program = torch.export.export(module, (x,), strict=strict)
        assert "fusion_kernels.mlp.default" in str(program.graph)
        torch.testing.assert_close(program.module()(x), module(x))
    with mlp_backend("auto"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(module, x)
    torch.testing.assert_close(traced(x), module(x), rtol=1e-4, atol=1e-4)


def test_an_integer_scale_is_held_as_float32() -> None:
    projections = {"w_in": nn.Linear(4, 3), "w_out": nn.Linear(3, 4)}
    for form in ("scaled", "split"):
        module = FusedMLP(projections, "gelu", scale=torch.tensor([1, 2, 3]), parameterization=form)
        assert module.scale is not None
        assert module.scale.dtype == torch.float32
        assert module.half()(torch.randn(2, 4).half()).dtype == torch.float16
        module.float()


# --- children that are more than their weights -----------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Quantised(Tensor):
    """Stands for the tensor subclasses that hold quantised or sharded weights."""


def _replace_forward(projection: nn.Linear) -> None:
    plain = projection.forward
    projection.forward = lambda x: plain(x) * 2  # type: ignore[method-assign]


def _subclass(projection: nn.Linear) -> None:
    projection.weight = nn.Parameter(projection.weight.detach().as_subclass(Quantised))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda p: parametrize.register_parametrization(p, "weight", Doubled()), r"ParametrizedLinear"),
        (_replace_forward, "a forward method of its own"),
        (_subclass, "Quantised in it"),
        (lambda p: p.register_forward_pre_hook(lambda m, args: (args[0] * 2,)), "a projection with hooks"),
    ],
)
@pytest.mark.parametrize("role", ["w_gate", "w_in", "w_out"])
def test_such_children_are_called(change: Callable[[nn.Module], Any], reason: str, role: str) -> None:
    plain = build(True).float()
    module = copy.deepcopy(plain)
    change(module.projection(role))
    x = torch.randn(7, 5)
    with pytest.warns(UserWarning, match=reason):
        y = module(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(x)
    if reason != "Quantised in it":
        assert not torch.allclose(y, plain(x))


def test_global_hooks_see_the_children() -> None:
    module, seen = build(False), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        with pytest.warns(UserWarning, match="a projection with hooks"):
            module(torch.randn(3, 5, dtype=torch.float64))
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 2


def test_adapters_train_to_what_they_train_to_on_the_plain_layer() -> None:
    """LoRA on the children of a fused module, three steps, against the same on a bare pair of projections."""
    torch.manual_seed(0)
    module = FusedMLP.from_mlp(nn.Linear(6, 9), nn.Linear(9, 6), scale=torch.arange(1, 10), parameterization="scaled")

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = copy.deepcopy(module.fc1), copy.deepcopy(module.fc2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(nn.functional.gelu(self.fc1(x)) * torch.arange(1.0, 10.0))

    hosts = []
    for child in (module, Plain()):
        host = nn.Module()
        host.ffn = child
        torch.manual_seed(1)
        hosts.append(inject_adapter_in_model(LoraConfig(r=2, target_modules=["fc1", "fc2"]), host))
    x, target = torch.randn(16, 6), torch.randn(16, 6)
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for host in hosts:
            optimizer = torch.optim.AdamW([p for p in host.parameters() if p.requires_grad], 1e-2)
            losses.append([])
            for _ in range(3):
                optimizer.zero_grad()
                loss = (host.ffn(x) - target).square().mean()
                loss.backward()
                optimizer.step()
                losses[-1].append(float(loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][2] < losses[0][0]


# --- around the module -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
def test_compiled_for_any_number_of_tokens_at_once(gated: bool) -> None:
    module = build(gated)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (3, 17, 123):
            x = torch.randn(tokens, 5, dtype=torch.float64)
            expected = gradients(copy.deepcopy(module), x)
            found = gradients(compiled, x)
            module.zero_grad()
            same({name.removeprefix("_orig_mod."): value for name, value in found.items()}, expected)


@pytest.mark.parametrize("gated", [False, True])
def test_autocast_computes_and_trains_as_the_children_do(gated: bool) -> None:
    module = build(gated, dtype=torch.float32, d=33, d_out=190)
    x = torch.randn(64, 33)
    exact = gradients(copy.deepcopy(module).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(copy.deepcopy(module), x)
        with pytest.warns(UserWarning, match="hooks"):
            allowed = gradients(through_children(module), x)
    assert found["y"].dtype == torch.bfloat16
    # Vectors together: of the few entries of one, the children's errors would be luck.
    pools: dict[str, list[list[Tensor]]] = {}
    for name, value in exact.items():
        assert found[name].dtype == allowed[name].dtype
        errors = [((given[name].double() - value) / value.norm()).flatten() for given in (found, allowed)]
        pools.setdefault(name if value.numel() >= MANY else "together", []).append(errors)
    for name, pool in pools.items():
        own, theirs = (torch.cat(side).norm() for side in zip(*pool, strict=True))
        assert sum(len(errors[0]) for errors in pool) >= MANY, name
        assert own <= RATIO * theirs, name


def test_activation_checkpointing_and_accumulation() -> None:
    module = build(False)
    parts = torch.randn(3, 8, 5, dtype=torch.float64)
    whole = gradients(copy.deepcopy(module), parts.reshape(24, 5))
    for part in parts:
        checkpoint(module, part.requires_grad_(), use_reentrant=False).square().sum().backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-10, atol=1e-10)


def test_transforms_of_torch_func() -> None:
    module = build(True)
    parameters = dict(module.named_parameters())
    x = torch.randn(6, 5, dtype=torch.float64)

    def run(p: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(module, p, (row,))

    per_row = torch.func.vmap(torch.func.jacrev(run), (None, 0))(parameters, x)
    y = module(x)
    for name, parameter in parameters.items():
        (one,) = torch.autograd.grad(y[2, 1], parameter, retain_graph=True)
        torch.testing.assert_close(per_row[name][2, 1], one, rtol=1e-10, atol=1e-12)


def test_replicas_and_shards(tmp_path: Path) -> None:
    script = Path(parallel.__file__)
    environment = {**os.environ, "FUSION_KERNELS_MLP_BACKEND": BACKEND}
    processes = [subprocess.Popen([sys.executable, script, str(rank), tmp_path], env=environment) for rank in range(2)]
    assert [process.wait(timeout=600) for process in processes] == [0, 0]
    module, x = parallel.module_and_batch()
    parallel.loss_of(module, x).backward()
    for kind in parallel.KINDS:
        found = torch.load(tmp_path / f"{kind}.pt", weights_only=True)
        for name, p in module.named_parameters():
            torch.testing.assert_close(found[name], p.grad, rtol=1e-5, atol=1e-6, msg=f"{kind}, {name}")
    for form in fused_forms.FORMS:
        model = fused_forms.fused_model(form)
        model(fused_forms.tokens())[0].square().mean().backward()
        found = torch.load(tmp_path / f"{form}.pt", weights_only=True)
        # Of all together: the bias of keys, for one, has no gradient but of rounding.
        limit = 1e-4 * max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
        for name, p in model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=limit, msg=f"{form}, {name}")


def test_reading_past_a_child_is_only_for_plain_ones() -> None:
    assert layouts.obstacle(nn.Linear(2, 3)) is None
    assert layouts.obstacle(Conv1D(3, 2)) is None
    assert layouts.obstacle(nn.Sequential()) == "a torch.nn.modules.container.Sequential"
