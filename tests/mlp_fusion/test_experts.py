"""`FusedExperts` and the `"fused"` experts implementation inside real Mixture-of-Experts models of transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.activations import ACT2FN

from bundles import random_bundle
from fusion_kernels.activations import ACTIVATIONS
from mlp_fusion import FusedExperts, InputError
from mlp_fusion.modules.activations import CONFIG_ACTIVATIONS
from mlp_fusion.modules.experts import read_experts

_SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 50,
    "num_experts_per_tok": 2,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(**_SIZES, intermediate_size=24, num_local_experts=4),
    "qwen2_moe": Qwen2MoeConfig(
        **_SIZES, moe_intermediate_size=8, shared_expert_intermediate_size=8, num_experts=5, intermediate_size=24
    ),
    "qwen3_moe": Qwen3MoeConfig(**_SIZES, moe_intermediate_size=8, num_experts=5, intermediate_size=24, head_dim=8),
    "gpt_oss": GptOssConfig(
        **_SIZES, intermediate_size=24, num_local_experts=4, head_dim=8, layer_types=["full_attention"] * 2
    ),
}
FORMS = ("folded", "scaled", "split")


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def model_of(family: str) -> Any:
    """Run expert by expert, because transformers' default does not take float64."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family])).double().eval()
    model.set_experts_implementation("eager")
    return model


def experts_of(model: Any) -> list[nn.Module]:
    return [layer.mlp.experts for layer in model.model.layers]


def ids() -> Tensor:
    return torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))


def outputs_and_gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(ids(), labels=ids())
    loss.loss.backward()
    return loss.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", CONFIGS)
def test_the_implementation_computes_and_trains_as_transformers_own(family: str) -> None:
    model = model_of(family)
    expected, wanted = outputs_and_gradients(model)
    model.set_experts_implementation("fused")
    found, gradients = outputs_and_gradients(model)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert gradients.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", CONFIGS)
def test_a_module_in_the_experts_place_keeps_outputs_and_names(family: str) -> None:
    model = model_of(family)
    expected, names = model(ids()).logits, list(model.state_dict())
    for layer in model.model.layers:
        layer.mlp.experts = FusedExperts.from_experts(layer.mlp.experts)
    torch.testing.assert_close(model(ids()).logits, expected, rtol=1e-10, atol=1e-12)
    assert sorted(model.state_dict()) == sorted(names)


def naive(bundle: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """From the bundle's own forward, expert by expert on all tokens."""
    everywhere = bundle.forward(x)  # (E, T, d_out)
    return torch.stack(
        [sum(w * everywhere[e, t] for e, w in zip(index[t].tolist(), weights[t], strict=True)) for t in range(len(x))]
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (True, True), (False, True)])
def test_a_fused_bundle(form: str, gated: bool, bias: bool) -> None:
    bundle = random_bundle(batch=3, width=7, gated=gated, bias=bias, scale=True, activation="silu")
    module = FusedExperts(bundle, form)
    x = torch.randn(11, 5, dtype=torch.float64)
    index = torch.rand(11, 3).topk(2).indices
    weights = torch.rand(11, 2, dtype=torch.float64)
    expected = naive(bundle, x, index, weights)
    torch.testing.assert_close(module(x, index, weights), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(module.as_bundle().forward(x), bundle.forward(x), rtol=1e-10, atol=1e-10)
    assert (module.scale is None) == (form == "folded")
    parameters = [id(p) for p in module.parameters()]
    module.merge_scale()
    assert module.scale is None
    assert [id(p) for p in module.parameters()] == parameters
    torch.testing.assert_close(module(x, index, weights), expected, rtol=1e-10, atol=1e-12)
    module.merge_scale()


def test_parameterizations_train_differently_and_the_scale_keeps_its_precision() -> None:
    bundle = random_bundle(batch=3, width=7, gated=True, bias=False, scale=True, activation="silu")
    x, index, weights = torch.randn(6, 5).double(), torch.rand(6, 3).topk(2).indices, torch.rand(6, 2).double()
    gradients = {}
    for form in FORMS:
        module = FusedExperts(bundle, form)
        module(x, index, weights).square().sum().backward()
        assert module.down_proj.grad is not None
        gradients[form] = module.down_proj.grad
    assert bundle.scale is not None
    p = bundle.scale[:, None, :]
    # y depends on p W and on sqrt(p) W: the chain rule.
    torch.testing.assert_close(gradients["scaled"], gradients["folded"] * p)
    torch.testing.assert_close(gradients["split"], gradients["folded"] * p.sqrt())
    half = FusedExperts(bundle.to(dtype=torch.float32), "scaled").to(torch.bfloat16)
    assert half.scale is not None
    assert half.scale.dtype == torch.float32
    assert half(x.bfloat16(), index, weights.bfloat16()).dtype == torch.bfloat16


def test_from_experts_with_cluster_sizes_copies() -> None:
    experts = experts_of(model_of("mixtral"))[0]
    sizes = torch.randint(1, 6, (4, 24))
    module = FusedExperts.from_experts(experts, sizes, "scaled", checkpoint_level=2)
    assert module.checkpoint_level == 2
    assert sorted(module.state_dict()) == ["down_proj", "gate_up_proj", "scale"]
    x, index, weights = torch.randn(8, 16).double(), torch.rand(8, 4).topk(2).indices, torch.rand(8, 2).double()
    original = copy.deepcopy(experts)
    with torch.no_grad():
        original.down_proj.mul_(sizes[:, None, :])  # type: ignore[union-attr, operator]
    torch.testing.assert_close(module(x, index, weights), original(x, index, weights), rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        experts.down_proj.zero_()  # type: ignore[union-attr, operator]
    assert bool(module.down_proj.any())
    with pytest.raises(ValueError, match="scale must be"):
        FusedExperts.from_experts(experts, sizes[:, :3], "scaled")


def changed(experts: nn.Module, gated: Callable[[Tensor, Tensor], Any]) -> nn.Module:
    """Experts of another class, which gates as is given."""
    apply = lambda self, values: gated(values[..., ::2], values[..., 1::2])  # noqa: E731
    other = copy.copy(experts)
    other.__class__ = type("Offset", (type(experts),), {"_apply_gate": apply})
    return other


def test_experts_that_are_more_than_blocks_are_refused() -> None:
    own = experts_of(model_of("gpt_oss"))[0]
    own.num_experts = 2.5  # a number is no limit unless it is where the limit is
    assert read_experts(own).gating.limit == 7.0
    with pytest.raises(
        InputError, match="Offset gates in a way of its own, which is no form that there is a kernel for"
    ):
        read_experts(changed(own, lambda gate, up: gate.clamp(max=7) * (up + 0.5)))
    with pytest.raises(
        InputError, match="Offset gates in a way of its own, which is no form that there is a kernel for"
    ):
        read_experts(changed(own, lambda gate, up: gate.clamp(max=5000.0).relu() * up))
    with pytest.raises(InputError, match="Offset gates in a way of its own, which raises ZeroDivisionError when it is"):
        read_experts(changed(own, lambda gate, up: 1 // 0))
    with pytest.raises(InputError, match="which returns no hidden values of one gate and one up each"):
        read_experts(changed(own, lambda gate, up: gate.sum()))
    plain = experts_of(model_of("mixtral"))[0]
    plain.act_fn = nn.Tanh()
    with pytest.raises(InputError, match="MixtralExperts has the activation Tanh"):
        read_experts(plain)
    quantised: Any = experts_of(model_of("mixtral"))[0]
    quantised.down_proj = nn.Parameter(quantised.down_proj.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"MixtralExperts.down_proj is a Parameter of torch.int8: load"):
        read_experts(quantised)


@pytest.mark.parametrize(("transposed", "concatenated"), [(True, True), (False, False), (True, False)])
def test_other_layouts_are_read(transposed: bool, concatenated: bool) -> None:
    experts: Any = experts_of(model_of("mixtral"))[0]
    expected = read_experts(experts)
    stored = experts.gate_up_proj.detach()
    if not concatenated:
        stored = torch.stack(stored.chunk(2, 1), 2).flatten(1, 2)
    experts.gate_up_proj = nn.Parameter(stored.mT.contiguous() if transposed else stored)
    experts.down_proj = nn.Parameter(experts.down_proj.detach().mT.contiguous() if transposed else experts.down_proj)
    experts.is_transposed, experts.is_concatenated = transposed, concatenated
    found = read_experts(experts)
    for name in ("w_in", "w_gate", "w_out"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_a_scale_is_folded_where_the_model_has_experts_and_refused_elsewhere(tmp_path: Any) -> None:
    model = model_of("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts = FusedExperts.from_experts(layer.mlp.experts, torch.full((4, 24), 2), "scaled")
    expected = model(ids()).logits
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "scaled")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    model.beside = copy.deepcopy(model.model.layers[0].mlp.experts)
    with pytest.raises(InputError, match=r"beside holds a scale.* call its merge_scale\(\) before saving"):
        model.save_pretrained(tmp_path / "beside")
    assert not (tmp_path / "beside").exists()
    del model.beside
    for layer in model.model.layers:
        layer.mlp.experts.merge_scale()
    model.save_pretrained(tmp_path / "merged")
    for name in ("scaled", "merged"):
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / name, dtype=torch.float64, experts_implementation="fused"
        )
        torch.testing.assert_close(loaded(ids()).logits, expected, rtol=1e-6, atol=1e-6)


def test_the_activations_of_configs_are_those_of_the_table() -> None:
    z = torch.cat([torch.linspace(-12, 12, 97), torch.tensor([-1e4, -0.0, 0.0, 1e4])]).double()
    assert set(CONFIG_ACTIVATIONS.values()) == set(ACTIVATIONS)
    for name, ours in CONFIG_ACTIVATIONS.items():
        torch.testing.assert_close(ACT2FN[name](z), ACTIVATIONS[ours].function(z), rtol=1e-12, atol=1e-12)
