"""`FusedMLP` and `FusedGLU`: outputs, gradients, state, scale handling, adapters."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers.activations import ACT2FN

from bundles import random_bundle
from fusion_kernels import mlp_backend, native, ntk_gram
from mlp_fusion import FusedGLU, FusedMLP, InputError
from mlp_fusion.modules import FusedFFN
from mlp_fusion.modules.activations import CONFIG_ACTIVATIONS

FORMS = ("folded", "scaled", "split")


@pytest.fixture(autouse=True, params=["children", "operator"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways through a module: so few tokens go through the children unless a backend is pinned."""
    operator = "torch" if native.UNAVAILABLE else "cpu"
    with mlp_backend("auto" if request.param == "children" else operator):
        yield request.param


def _module(gated: bool, form: str = "scaled", **options: Any) -> tuple[FusedFFN, Any]:
    bundle = random_bundle(width=17, gated=gated, scale=True, **options)
    cls = FusedGLU if gated else FusedMLP
    return cls.from_bundle(bundle, form), bundle


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "silu"])
def test_forward_equals_the_bundle(gated: bool, bias: bool, form: str, activation: str) -> None:
    module, bundle = _module(gated, form, bias=bias, activation=activation)
    for shape in [(1, 5), (17, 5), (2, 3, 5), (0, 5), (5,)]:
        x = torch.randn(shape, dtype=torch.float64)
        expected = bundle.forward(x.reshape(-1, 5))[0].reshape(*shape[:-1], 4)
        torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(module.as_bundle().forward(x), bundle.forward(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gated", [False, True])
def test_gradients(gated: bool, form: str) -> None:
    module, _ = _module(gated, form)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    names = [n for n, _ in module.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *[p.detach().clone().requires_grad_() for p in module.parameters()]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_low_precision_is_no_worse_than_the_plain_layer(dtype: torch.dtype, form: str) -> None:
    bundle = random_bundle(width=123, d=33, d_out=17, scale=True)
    x = torch.randn(64, 33, dtype=torch.float64)
    exact = bundle.forward(x)[0]
    module = FusedMLP.from_bundle(bundle, form)
    scale = module.scale
    module = module.to(dtype)
    module.scale = scale  # stays in full precision beside half precision weights, as `fuse` leaves it
    folded = bundle.parameterized("folded")
    plain = folded.to(dtype=dtype).forward(x.to(dtype))[0].double()
    found = module(x.to(dtype))
    assert found.dtype == dtype
    error, allowed = (found.double() - exact), (plain - exact)
    assert error.abs().max() <= 2 * allowed.abs().max()
    assert error.square().mean().sqrt() <= 2 * allowed.square().mean().sqrt()


def test_from_mlp_copies_and_state_dict_is_plain_plus_scale() -> None:
    fc1, fc2 = nn.Linear(5, 6), nn.Linear(6, 4)
    scale = torch.tensor([1, 2, 3, 4, 5, 6])
    module = FusedMLP.from_mlp(fc1, fc2, scale=scale, parameterization="scaled")
    assert list(module.state_dict()) == ["scale", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    assert type(module.fc1) is nn.Linear
    assert torch.equal(module.fc1.weight, fc1.weight)
    x = torch.randn(3, 5)
    expected = fc2(torch.nn.functional.gelu(fc1(x)) * scale)
    for form in FORMS:
        other = FusedMLP.from_mlp(fc1, fc2, scale=scale, parameterization=form)
        torch.testing.assert_close(other(x), expected)
    with torch.no_grad():
        fc1.weight.zero_()
    assert module.fc1.weight.abs().sum() > 0
    plain = FusedMLP.from_mlp(fc1, fc2)
    assert list(plain.state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    torch.testing.assert_close(plain(x), fc2(torch.nn.functional.gelu(fc1(x))))


@pytest.mark.parametrize("name", sorted(CONFIG_ACTIVATIONS))
def test_activations_by_the_names_of_configs(name: str) -> None:
    fc1, fc2, x = nn.Linear(5, 7), nn.Linear(7, 3), torch.randn(11, 5)
    module = FusedMLP.from_mlp(fc1, fc2, activation=name)
    torch.testing.assert_close(module(x), fc2(ACT2FN[name](fc1(x))))
    gated = FusedGLU.from_mlp(fc1, nn.Linear(5, 7), fc2, activation=name)
    torch.testing.assert_close(gated(x), fc2(ACT2FN[name](fc1(x)) * gated.projection("w_in")(x)))


def test_glu_from_mlp() -> None:
    gate, up, down = nn.Linear(5, 6, bias=False), nn.Linear(5, 6, bias=False), nn.Linear(6, 5, bias=False)
    scale, x = torch.arange(1.0, 7.0), torch.randn(3, 5)
    expected = down(torch.nn.functional.silu(gate(x)) * up(x) * scale)
    for form in FORMS:
        module = FusedGLU.from_mlp(gate, up, down, scale=scale, parameterization=form)
        torch.testing.assert_close(module(x), expected)
    assert list(module.state_dict()) == ["scale", "gate.weight", "up.weight", "down.weight"]


def test_a_trainable_scale_is_trained() -> None:
    fc1, fc2 = nn.Linear(5, 6), nn.Linear(6, 4)
    scale = nn.Parameter(torch.full((6,), 2.0))
    for form in ("scaled", "split"):
        module = FusedMLP.from_mlp(fc1, fc2, scale=scale, parameterization=form)
        assert "scale" in dict(module.named_parameters())
        module(torch.randn(3, 5)).sum().backward()
        assert isinstance(module.scale, nn.Parameter)
        assert module.scale.grad is not None
        assert bool((module.scale.grad != 0).any())
    with pytest.raises(ValueError, match="trainable scale cannot be folded"):
        FusedMLP.from_mlp(fc1, fc2, scale=scale)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_merge_scale_keeps_outputs_and_parameters(gated: bool, form: str) -> None:
    module, _ = _module(gated, form)
    x = torch.randn(9, 5, dtype=torch.float64)
    before, parameters = module(x), [id(p) for p in module.parameters()]
    module.merge_scale()
    torch.testing.assert_close(module(x), before, rtol=1e-10, atol=1e-10)
    assert [id(p) for p in module.parameters()] == parameters
    assert "scale" not in module.state_dict()
    assert module.parameterization == "folded"
    module.merge_scale()
    torch.testing.assert_close(module(x), before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_copies_and_pickles(form: str) -> None:
    module, _ = _module(False, form)
    x = torch.randn(3, 5, dtype=torch.float64)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
        with torch.no_grad():
            other.fc1.weight.zero_()
        assert not torch.equal(other(x), module(x))


def test_lora_on_the_children_is_applied_and_trained() -> None:
    module, bundle = _module(False, "scaled")
    host = nn.Module()
    host.ffn = module.float()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["fc1", "fc2"], init_lora_weights=False), host)
    x = torch.randn(8, 5)
    with torch.no_grad():
        assert not torch.allclose(module(x), bundle.to(dtype=torch.float32).forward(x)[0])
    module(x).square().sum().backward()
    gradients = [p.grad for n, p in host.named_parameters() if "lora" in n]
    assert len(gradients) == 4
    assert all(g is not None and bool((g != 0).any()) for g in gradients)
    with pytest.raises(InputError, match="merge adapters"):
        module.as_bundle()


def test_hooks_on_children_run() -> None:
    module, _ = _module(True)
    seen: list[str] = []
    for name in ("gate", "up", "down"):
        module.get_submodule(name).register_forward_hook(lambda *_, n=name: seen.append(n))
    module(torch.randn(2, 5, dtype=torch.float64))
    assert sorted(seen) == ["down", "gate", "up"]


@pytest.mark.slow
def test_torch_compile_matches_eager() -> None:
    for gated in (False, True):
        for form in FORMS:
            module, _ = _module(gated, form)
            x = torch.randn(6, 5, dtype=torch.float64)
            compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x), module(x))


def test_trainable_parts_follow_requires_grad() -> None:
    module, _ = _module(True)
    assert set(module.trainable_parts()) == {"w_gate", "b_gate", "w_in", "b_in", "w_out", "b_out"}
    module.requires_grad_(False)
    module.get_submodule("up").weight.requires_grad_(True)  # type: ignore[union-attr]
    assert module.trainable_parts() == ("w_in",)
    x = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(ntk_gram(module, x), ntk_gram(module, x, params="w_in"))


def test_bad_input_is_named() -> None:
    fc1, fc2 = nn.Linear(5, 6), nn.Linear(6, 4)
    with pytest.raises(ValueError, match="unknown activation"):
        FusedMLP.from_mlp(fc1, fc2, activation="tanh")
    with pytest.raises(ValueError, match="unknown parameterization 'explicit'"):
        FusedMLP.from_mlp(fc1, fc2, scale=torch.ones(6), parameterization="explicit")
    with pytest.raises(ValueError, match="scale must be"):
        FusedMLP.from_mlp(fc1, fc2, scale=torch.ones(5))
    with pytest.raises(ValueError, match="w_out must be"):
        FusedMLP.from_mlp(fc1, nn.Linear(7, 4))
    with pytest.raises(InputError, match=r"not a plain torch\.nn\.Linear"):
        FusedMLP.from_mlp(nn.Sequential(fc1), fc2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the bundle has 2"):
        FusedMLP.from_bundle(random_bundle(batch=2))
    with pytest.raises(ValueError, match="takes a gated bundle"):
        FusedGLU.from_bundle(random_bundle())
    with pytest.raises(ValueError, match="pass scale=None"):
        FusedMLP({"w_in": fc1, "w_out": fc2}, "gelu", scale=torch.ones(6))
