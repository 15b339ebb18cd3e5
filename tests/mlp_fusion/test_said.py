"""SAID and DID: what is trained, against its formula, its gradients against those of whole tensors, and its memory."""

from __future__ import annotations

import contextlib
import copy
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from companion_models import IDS, attached, classifier, logits
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, BertConfig

import mlp_fusion
from fusion_kernels import fastfood, fastfood_transposed
from mlp_fusion.companions import projected
from mlp_fusion.companions.said import SaidLayer, seed_of

HEAD = ["classifier"]


def layers(made: Any) -> dict[str, SaidLayer]:
    """Layers by the names of the modules that they are around."""
    model = made.base_model.model
    found = {name: module for name, module in model.named_modules() if isinstance(module, SaidLayer)}
    return {name.replace("base_layer.", ""): layer for name, layer in found.items()}


def theta_of(made: Any) -> nn.Parameter:
    [found] = [p for name, p in made.named_parameters() if name.endswith("said_theta.default")]
    return found


def lambdas(made: Any) -> dict[str, Tensor]:
    """By tensor; ones where there are none."""
    found = {}
    for name, layer in layers(made).items():
        for own, p in layer.projections["default"].items():
            one = torch.ones(())
            if p.owner is layer:
                found[f"{name}.{own}"] = one if p.place is None else layer.said_lambda["default"][p.place].detach()
    return found


def masked(**changes: Any) -> Any:
    """A masked language model, whose output layer shares the table of its embeddings."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return AutoModelForMaskedLM.from_config(BertConfig(**sizes, vocab_size=90, **changes)).eval()


@pytest.mark.parametrize("structure_aware", [True, False])
@pytest.mark.parametrize("head", [HEAD, None])
def test_d_numbers_are_trained_in_all(structure_aware: bool, head: list[str] | None) -> None:
    model = classifier()
    made = get_peft_model(model, mlp_fusion.SaidConfig(d=90, structure_aware=structure_aware, modules_to_save=head))
    own = {n: p for n, p in made.named_parameters() if "said_" in n}
    assert sum(p.numel() for p in own.values() if p.requires_grad) == 90
    tensors = len(list(classifier().parameters())) - (2 if head else 0)
    assert len(theta_of(made)) == 90 - (tensors if structure_aware else 0)
    assert len(lambdas(made)) == tensors
    assert not theta_of(made).any()
    assert all(value == 1 for value in lambdas(made).values())
    whole = [n for n, p in made.named_parameters() if p.requires_grad and n not in own]
    assert len(whole) == (2 if head else 0)
    assert all("classifier" in n for n in whole)


@pytest.mark.parametrize("structure_aware", [True, False])
def test_every_tensor_is_moved_by_its_own_projection(structure_aware: bool) -> None:
    model = classifier()
    made = attached(model, mlp_fusion.SaidConfig(d=100, seed=4, structure_aware=structure_aware))
    theta, factors = theta_of(made).detach(), lambdas(made)
    merged = dict(made.merge_and_unload().named_parameters())
    assert set(factors) == set(merged)
    for name, before in model.named_parameters():
        moved = factors[name] * fastfood(theta, before.numel(), seed_of(4, name)).view(before.shape)
        torch.testing.assert_close(merged[name] - before, moved, rtol=1e-5, atol=1e-6)
        assert bool(moved.any())


def whole_gradients(made: Any, loss: Any) -> dict[str, Tensor]:
    """The gradients of the whole tensors, in a merged copy."""
    merged = copy.deepcopy(made).merge_and_unload()
    for parameter in merged.parameters():
        parameter.requires_grad_()
    loss(merged).backward()
    return {name: p.grad for name, p in merged.named_parameters() if p.grad is not None}


def of_logits(model: Any) -> Tensor:
    weights = torch.linspace(-1, 1, 4).view(2, 2)
    found: Tensor = (model(IDS).logits * weights.to(model.dtype)).sum()
    return found


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_those_of_the_tensors_projected_back(published: bool, fused: bool) -> None:
    model = classifier().double()
    if fused:
        mlp_fusion.fuse(model, 16)
    config = mlp_fusion.SaidConfig(d=100, published_gradient=published)
    made = attached(model, config)
    of_logits(made).backward()
    theta, factors, wanted = theta_of(made), lambdas(made), whole_gradients(made, of_logits)
    total, of_factors = torch.zeros_like(theta), {}
    for name, dw in wanted.items():
        back = fastfood_transposed(dw.flatten(), len(theta), seed_of(0, name))
        of_factors[name] = back @ theta.detach()
        L = 1 << math.ceil(math.log2(dw.numel()))
        total += factors[name] * back / (L if published else 1)
    torch.testing.assert_close(theta.grad, total)
    for name, layer in layers(made).items():
        for own, p in layer.projections["default"].items():
            found = layer.said_lambda["default"].grad[p.place]
            torch.testing.assert_close(found, of_factors.get(f"{name}.{own}", torch.zeros_like(found)))


def test_tensors_that_modules_share_are_one(tmp_path: Path) -> None:
    model = masked()
    made = attached(model, mlp_fusion.SaidConfig(d=100))
    unique = list(model.parameters())
    assert len(lambdas(made)) == len(unique)

    def loss(of: Any) -> Tensor:
        found: Tensor = of(IDS).logits[..., :7].square().mean()
        return found

    loss(made).backward()
    name = "bert.embeddings.word_embeddings"
    shared = whole_gradients(made, loss)[f"{name}.weight"]
    back = fastfood_transposed(shared.flatten(), len(theta_of(made)), seed_of(0, f"{name}.weight"))
    found = layers(made)[name].said_lambda["default"].grad[0]
    torch.testing.assert_close(found, back @ theta_of(made).detach(), rtol=1e-4, atol=1e-6)
    with_it = logits(made)
    made.merge_adapter()
    torch.testing.assert_close(logits(made), with_it)
    with made.disable_adapter():
        assert torch.equal(logits(made), logits(model))
    made.unmerge_adapter()
    assert torch.equal(logits(made), with_it)
    merged = made.merge_and_unload()
    torch.testing.assert_close(logits(merged), with_it)
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight


class Backwards(nn.Module):
    """Two projections with one weight, of which the second is called first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.second(x).tanh())


def test_whoever_is_called_first_unmerges_what_is_shared() -> None:
    torch.manual_seed(0)
    model, x = Backwards(), torch.randn(3, 5)
    made = get_peft_model(copy.deepcopy(model), mlp_fusion.SaidConfig(d=20))
    assert len(lambdas(made)) == 3
    theta_of(made).data.normal_()
    made.merge_adapter()
    with made.disable_adapter():
        assert torch.equal(made(x), model(x))


def test_a_scale_that_trains_is_not_moved() -> None:
    fc1, fc2 = nn.Linear(4, 6), nn.Linear(6, 4)
    block = mlp_fusion.FusedMLP.from_mlp(fc1, fc2, scale=nn.Parameter(torch.ones(6)), parameterization="scaled")
    made = get_peft_model(nn.Sequential(block), mlp_fusion.SaidConfig(d=20))
    assert len(lambdas(made)) == 4
    assert not any("scale" in name for name in lambdas(made))


@pytest.mark.parametrize("safe", [False, True])
def test_a_broken_one_is_not_left_in_the_model(safe: bool) -> None:
    made = attached(classifier(), mlp_fusion.SaidConfig(d=100))
    before = {name: p.clone() for name, p in made.named_parameters()}
    theta_of(made).data[3] = math.inf
    if not safe:
        assert not all(bool(p.isfinite().all()) for p in made.merge_and_unload().parameters())
        return
    with pytest.raises(mlp_fusion.InputError, match="merging default would make weights infinite or NaN"):
        made.merge_and_unload(safe_merge=True)
    base = {name: p for name, p in made.named_parameters() if "said_" not in name}
    assert all(torch.equal(p, before[name]) for name, p in base.items())


def test_what_is_stored_is_what_was_trained(tmp_path: Path) -> None:
    made = attached(classifier(), mlp_fusion.SaidConfig(d=100))
    made.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 100 * 4 + 200 * len(layers(made))
    base = {name for name, _ in classifier().state_dict().items()}
    state = made.base_model.model.state_dict()
    beside = sum(t.numel() for name, t in state.items() if name.replace("base_layer.", "") not in base)
    assert beside == 100


def large() -> nn.Module:
    """Modules with large weights of which the backward needs some: of every kind that has its own way."""
    return nn.Sequential(
        nn.Embedding(300, 64), nn.Linear(64, 300), nn.ReLU(), nn.Unflatten(1, (1, 300)), nn.Conv1d(1, 128, 150),
        nn.Flatten(), nn.LayerNorm(128 * 151),
    )  # fmt: skip


def test_moved_weights_are_gone_when_the_pass_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    made = get_peft_model(large(), mlp_fusion.SaidConfig(d=50))
    seen: list[Any] = []
    original = projected._sum

    def watched(*args: Any) -> Tensor:
        found = original(*args)
        if found.numel() >= projected.LARGE:
            seen.append(weakref.ref(found))
        return found

    monkeypatch.setattr(projected, "_sum", watched)
    loss = made(torch.arange(8)).square().mean()
    assert len(seen) == 5  # of the embedding, the projection, the filter, and both of the norm
    assert all(reference() is None for reference in seen)
    loss.backward()
    assert len(seen) > 5  # made again
    assert all(reference() is None for reference in seen)
    assert all(p.grad is None for n, p in made.named_parameters() if "said_" not in n)


def test_gradients_through_every_kind_of_module() -> None:
    model = large().double()
    made = get_peft_model(copy.deepcopy(model), mlp_fusion.SaidConfig(d=50, structure_aware=False))
    theta = theta_of(made)
    theta.data.normal_(generator=torch.Generator().manual_seed(0))
    weights = torch.randn(8, 128 * 151, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (made(torch.arange(8)) * weights).sum().backward()
    wanted = torch.zeros_like(theta)
    parameters = {}
    for name, p in model.named_parameters():
        parameters[name] = p.detach() + fastfood(theta.detach(), p.numel(), seed_of(0, name)).view(p.shape)
        parameters[name].requires_grad_()
    (torch.func.functional_call(model, parameters, (torch.arange(8),)) * weights).sum().backward()
    for name, p in parameters.items():
        wanted += fastfood_transposed(p.grad.flatten(), len(theta), seed_of(0, name))
    torch.testing.assert_close(theta.grad, wanted)


class Seen(nn.Module):
    """Passes on what it gets, and remembers it for as long as it lives."""

    def forward(self, x: Tensor) -> Tensor:
        self.it = weakref.ref(x)
        return x


class Gated(nn.Module):
    """The product of two halves."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return a.sigmoid() * b


@pytest.mark.parametrize(
    ("between", "gone"),
    [(nn.GELU(), True), (nn.GELU("tanh"), True), (nn.SiLU(), True), (Gated(), True), (nn.Softplus(), False)],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("hooks", [False, True])
def test_inputs_that_can_be_made_again_are_not_kept(between: nn.Module, gone: bool, hooks: bool) -> None:
    torch.manual_seed(0)
    seen = Seen()
    model = nn.Sequential(nn.Linear(4, 12), between, seen, nn.Linear(6 if isinstance(between, Gated) else 12, 3))
    made = get_peft_model(model.double(), mlp_fusion.SaidConfig(d=30))
    theta_of(made).data.normal_()
    x = torch.randn(5, 4, dtype=torch.float64)
    asked = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with asked if hooks else contextlib.nullcontext():
        y = made(x)
    kept = seen.it() is not None
    y.square().sum().backward()
    assert kept == (hooks or not gone)
    names = dict(made.named_parameters())
    trained = {name: p.detach() for name, p in names.items() if p.requires_grad}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(made, values, (x,)).square().sum()

    for name, wanted in torch.func.grad(loss)(trained).items():
        torch.testing.assert_close(names[name].grad, wanted)


@pytest.mark.parametrize("which", [1, 4])
def test_a_step_between_forward_and_backward_is_noticed(which: int) -> None:
    made = get_peft_model(large(), mlp_fusion.SaidConfig(d=30, target_modules=[str(which)]))
    loss = made(torch.arange(8)).square().mean()
    with torch.no_grad():
        theta_of(made).add_(1.0)
    with pytest.raises(RuntimeError, match=r"in.?place"):
        loss.backward()


def test_a_step_is_noticed_where_only_the_input_has_a_gradient() -> None:
    made = get_peft_model(nn.Sequential(nn.Conv1d(1, 128, 150)), mlp_fusion.SaidConfig(d=30))
    x = torch.randn(2, 1, 151, requires_grad=True)
    loss = made(x).square().mean()
    with torch.no_grad():
        theta_of(made).add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place between forward and backward"):
        torch.autograd.grad(loss, x)


class Nested(nn.Module):
    """A module that owns parameters and modules, and reads the weight of one that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(6))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.read = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x, x + self.shift, x)[0]
        return torch.nn.functional.linear(x, self.read.weight, self.read.bias)


def test_modules_in_modules_and_weights_that_are_read() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Nested(), nn.Linear(6, 3))
    made = get_peft_model(copy.deepcopy(model), mlp_fusion.SaidConfig(d=40, structure_aware=False)).train()
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(made(x), model(x))
    theta_of(made).data.normal_()
    moved = made(x)
    expected = {
        name: p + fastfood(theta_of(made), p.numel(), seed_of(0, name)).view(p.shape)
        for name, p in model.named_parameters()
    }
    torch.testing.assert_close(moved, torch.func.functional_call(model, expected, (x,)))
    moved.square().sum().backward()
    found = theta_of(made).grad.clone()
    (wanted,) = torch.autograd.grad(
        torch.func.functional_call(model, expected, (x,)).square().sum(), theta_of(made)
    )  # fmt: skip
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    merged = made.merge_and_unload()
    torch.testing.assert_close(merged(x), moved)
    assert not any(isinstance(module, SaidLayer) for module in merged.modules())


@pytest.mark.parametrize("way", ["compiled", "transformed"])
def test_compilers_and_transforms_differentiate_the_same(way: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 2)).double()
    made = get_peft_model(model, mlp_fusion.SaidConfig(d=30, published_gradient=True))
    trained = {name: p for name, p in made.named_parameters() if p.requires_grad}
    for p in trained.values():
        p.data.normal_()
    x = torch.randn(4, 5, dtype=torch.float64)
    made(x).square().sum().backward()
    if way == "compiled":
        wanted = {name: p.grad.clone() for name, p in trained.items()}
        made.zero_grad()
        torch.compile(made, backend="aot_eager")(x).square().sum().backward()
        found = {name: p.grad for name, p in trained.items()}
    else:
        wanted = {name: p.grad for name, p in trained.items()}

        def loss(values: dict[str, Tensor], one: Tensor) -> Tensor:
            return torch.func.functional_call(made, values, (one[None],)).square().sum()

        values = {name: p.detach() for name, p in trained.items()}
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x)
        found = {name: g.sum(0) for name, g in each.items()}
    assert found.keys() == wanted.keys()
    for name, g in wanted.items():
        torch.testing.assert_close(found[name], g)


def test_recomputed_activations_give_the_same_gradients() -> None:
    made = attached(classifier(), mlp_fusion.SaidConfig(d=100)).train()
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    of_logits(made).backward()
    wanted = theta_of(made).grad.clone()
    made.zero_grad()
    made.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    of_logits(made).backward()
    torch.testing.assert_close(theta_of(made).grad, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_bases_in_other_dtypes(dtype: torch.dtype) -> None:
    model = classifier().to(dtype)
    made = attached(model, mlp_fusion.SaidConfig(d=100), size=0.1)
    assert theta_of(made).dtype == torch.promote_types(dtype, torch.float32)
    of_logits(made).backward()
    assert bool(theta_of(made).grad.any())
    with_it = logits(made)
    assert torch.equal(logits(made.merge_and_unload()), with_it)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("structure_aware", [True, False])
@pytest.mark.parametrize("way", ["plain", "modules", "transformed"])
def test_cast_to_16_bits_it_computes_and_trains(
    way: str, structure_aware: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """theta and lambda as well, as `model.bfloat16()` does it; the sums are those of float32."""
    config = mlp_fusion.SaidConfig(d=100, structure_aware=structure_aware, published_gradient=way != "plain")
    made = attached(classifier(), config, size=0.1).to(dtype)
    wide = copy.deepcopy(made).float()
    if way == "transformed":
        monkeypatch.setattr("mlp_fusion.companions.said.transforms.active", lambda: True)
    elif way == "modules":
        monkeypatch.setattr("mlp_fusion.companions.said.obstacle", lambda _: "whatever")
    merged = copy.deepcopy(made).merge_and_unload()
    assert {p.dtype for p in made.parameters()} == {p.dtype for p in merged.parameters()} == {dtype}
    found, wanted = (logits(model).float() for model in (made, wide))
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.03)
    torch.testing.assert_close(logits(merged).float(), found, rtol=0.02, atol=0.03)
    before = theta_of(made).detach().clone()
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.5)
    for model in (made, wide):
        of_logits(model).float().backward()
    for name in ("said_theta", "said_lambda") if structure_aware else ("said_theta",):
        own, other = (torch.cat([p.grad.float() for n, p in m.named_parameters() if name in n]) for m in (made, wide))
        assert float((own - other).norm()) < 0.05 * float(other.norm())
    optimizer.step()
    assert not torch.equal(theta_of(made), before)
    logits(made)


def test_under_autocast_projections_run_in_its_dtype() -> None:
    made = attached(classifier(), mlp_fusion.SaidConfig(d=100), size=0.1)
    merged = copy.deepcopy(made).merge_and_unload()
    x = torch.randn(3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        own = layers(made)["bert.encoder.layer.0.intermediate.dense"](x)
        wanted = merged.bert.encoder.layer[0].intermediate.dense(x)
        of_logits(made).backward()
    assert own.dtype == torch.bfloat16
    assert torch.equal(own, wanted)
    assert theta_of(made).grad.dtype == torch.float32


def test_two_of_them_add_up_and_are_switched() -> None:
    model = classifier()
    made = attached(model, mlp_fusion.SaidConfig(d=100))
    alone = logits(made)
    made.add_adapter("other", mlp_fusion.SaidConfig(d=80, seed=1, structure_aware=False))
    made.set_adapter("other")
    assert torch.equal(logits(made), logits(model))
    [other] = [p for n, p in made.named_parameters() if n.endswith("said_theta.other")]
    assert other.requires_grad
    assert not theta_of(made).requires_grad
    other.data.normal_()
    assert (logits(made) - logits(model)).abs().max() > 1e-4
    made.base_model.set_adapter(["default", "other"])
    both = logits(made)
    merged = copy.deepcopy(made).merge_and_unload()
    torch.testing.assert_close(logits(merged), both)
    made.delete_adapter("other")
    made.set_adapter("default")
    assert torch.equal(logits(made), alone)
    assert not any("other" in n for n, _ in made.named_parameters())


def test_a_tensors_projection_depends_on_seed_and_name_alone() -> None:
    every = get_peft_model(classifier(), mlp_fusion.SaidConfig(d=100))
    some = get_peft_model(classifier(), mlp_fusion.SaidConfig(d=100, target_modules=["query"]))
    other = get_peft_model(classifier(), mlp_fusion.SaidConfig(d=100, seed=1))
    name = "bert.encoder.layer.1.attention.self.query"
    of, among, fresh = (layers(made)[name].projections["default"]["weight"].seed for made in (every, some, other))
    assert of == among == seed_of(0, f"{name}.weight")
    assert of != fresh
    assert layers(every)[name].projections["default"]["bias"].seed != of
