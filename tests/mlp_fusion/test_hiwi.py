"""HiWi: on weights as peft's PEANuT, on biases as its formula; what is stored does not grow with its rank."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from companion_models import IDS, attached, classifier, logits
from peft import PeanutConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config

import mlp_fusion
from mlp_fusion import HiWiConfig, InputError
from mlp_fusion.companions import hiwi
from mlp_fusion.companions.hiwi import SCALES, HiWiLayer, low_rank_is_cheaper


def layers(model: Any) -> list[HiWiLayer]:
    return [module for module in model.modules() if isinstance(module, HiWiLayer)]


@pytest.mark.parametrize("apart", [True, False], ids=["low rank", "composed"])
@pytest.mark.parametrize("act_fn", ["relu", "gelu"])
def test_on_weights_it_is_peanut_without_depth(apart: bool, act_fn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hiwi, "low_rank_is_cheaper", lambda *_, **__: apart)
    model, options = classifier(), {"r": 3, "scaling": 0.7, "act_fn": act_fn}
    own = attached(model, HiWiConfig(parameters="weight", **options), size=3.0)
    targets = ["intermediate.dense", "layer.0.output.dense", "layer.1.output.dense"]
    peer = get_peft_model(copy.deepcopy(model), PeanutConfig(target_modules=targets, **options)).eval()
    theirs = [module for module in peer.modules() if hasattr(module, "peanut_A")]
    assert len(theirs) == len(layers(own)) == 4
    with torch.no_grad():
        for ours, module in zip(layers(own), theirs, strict=True):
            module.peanut_A["default"].weight.copy_(ours.hiwi_weight_down["default"].T)
            module.peanut_B["default"].weight.copy_(ours.hiwi_weight_up["default"].T)
    assert (logits(peer) - logits(model)).abs().max() > 1e-3
    torch.testing.assert_close(logits(own), logits(peer), rtol=1e-4, atol=1e-6)
    for made in (own, peer):
        made(IDS).logits.square().sum().backward()
    for ours, module in zip(layers(own), theirs, strict=True):
        for mine, their in (("hiwi_weight_down", module.peanut_A), ("hiwi_weight_up", module.peanut_B)):
            wanted = their["default"].weight.grad.T
            torch.testing.assert_close(
                getattr(ours, mine)["default"].grad, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())
            )


def test_on_biases_it_is_its_formula_and_counts_as_published() -> None:
    made = attached(classifier(), HiWiConfig(r=5, scaling=2.0))
    for layer in layers(made):
        b, down, up = layer.base_layer.bias, layer.hiwi_bias_down["default"], layer.hiwi_bias_up["default"]
        n = layer.base_layer.out_features
        assert down.shape == (n, 5)
        assert up.shape == (5, n)
        wanted = b + 2.0 * nn.functional.gelu(b @ down) @ up
        torch.testing.assert_close(layer.changed(["default"])["bias"], wanted)
    assert sum(p.numel() for p in made.parameters() if p.requires_grad) == 2 * 5 * 2 * (32 + 48)


def test_the_scale_is_that_of_what_is_adapted_unless_it_is_said() -> None:
    for scaling, wanted in ((None, SCALES), (3.0, {"bias": 3.0, "weight": 3.0})):
        layer = layers(attached(classifier(), HiWiConfig(parameters="both", r=2, scaling=scaling)))[0]
        found = layer.deltas("default")
        W, b = layer.base_layer.weight, layer.base_layer.bias
        for own, fed, turned in (("weight", W.t(), found["weight"].t()), ("bias", b, found["bias"])):
            down, up = (getattr(layer, f"hiwi_{own}_{which}")["default"] for which in ("down", "up"))
            torch.testing.assert_close(turned, wanted[own] * nn.functional.gelu(fed @ down) @ up, rtol=1e-4, atol=1e-6)


def test_gradients_of_biases_are_numeric_ones() -> None:
    made = attached(classifier().double(), HiWiConfig(parameters="both", r=2))
    layer = layers(made)[1]
    x = torch.randn(3, 48, dtype=torch.float64)
    inputs = [p for p in layer.parameters() if p.requires_grad]
    assert len(inputs) == 4
    assert torch.autograd.gradcheck(lambda *_: layer(x), inputs)


def gpt2(zero: bool) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=90, n_positions=16))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0.0, 0.0 if zero else 0.02)
    return model.eval()


@pytest.mark.parametrize("apart", [True, False])
def test_projections_that_are_stored_the_other_way_round(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hiwi, "low_rank_is_cheaper", lambda *_, **__: apart)
    made = attached(gpt2(zero=False), HiWiConfig(parameters="both", r=2, scaling=1.0))
    assert [layer.nf for layer in layers(made)] == [128, 32]
    for layer in layers(made):
        W, down, up = layer.base_layer.weight, layer.hiwi_weight_down["default"], layer.hiwi_weight_up["default"]
        torch.testing.assert_close(layer.changed(["default"])["weight"], W + nn.functional.gelu(W @ down) @ up)
    with_it = logits(made)
    torch.testing.assert_close(logits(made.merge_and_unload()), with_it, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parameters", ["bias", "weight", "both"])
def test_the_sum_alone_is_stored_in_a_size_that_does_not_grow(parameters: str, tmp_path: Path) -> None:
    model, sizes = classifier(), []
    for r in (1, 6):
        made = attached(model, HiWiConfig(parameters=parameters, r=r, modules_to_save=["classifier"]))
        mlp_fusion.save_merged_delta(made, tmp_path / f"{r}")
        tensors = load_file(tmp_path / f"{r}" / "adapter_model.safetensors")
        sizes.append(sum(t.numel() for t in tensors.values()))
        again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / f"{r}").eval()
        torch.testing.assert_close(logits(again), logits(made), rtol=1e-4, atol=1e-6)
        assert not any(p.requires_grad for p in again.parameters())
        merged = again.merge_and_unload()
        torch.testing.assert_close(logits(merged), logits(made), rtol=1e-4, atol=1e-6)
    biases, weights, head = 2 * (32 + 48), 4 * 32 * 48, 32 * 2 + 2
    assert sizes == [head + {"bias": biases, "weight": weights, "both": biases + weights}[parameters]] * 2


def test_the_sum_alone_is_not_trained_on(tmp_path: Path) -> None:
    mlp_fusion.save_merged_delta(attached(classifier(), HiWiConfig()), tmp_path)
    with pytest.raises(InputError, match="its adapters are gone: load it without is_trainable"):
        PeftModel.from_pretrained(classifier(), tmp_path, is_trainable=True)
    again = PeftModel.from_pretrained(classifier(), tmp_path)
    again.set_adapter("default")
    assert not any(p.requires_grad for p in again.parameters())


def test_an_adapter_of_another_method_has_no_such_sum(tmp_path: Path) -> None:
    made = get_peft_model(classifier(), mlp_fusion.PafiConfig())
    with pytest.raises(InputError, match="'default' is not one of HiWi"):
        mlp_fusion.save_merged_delta(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_which_way_is_cheaper() -> None:
    """In training the whole matrix's gradient decides; without it, few tokens go beside the weight, many through it."""
    assert low_rank_is_cheaper(4096, 384, 1536, 4, trains=True)
    assert not low_rank_is_cheaper(4096, 384, 1536, 4, trains=False)
    assert low_rank_is_cheaper(8, 384, 1536, 4, trains=False)
    assert not low_rank_is_cheaper(4096, 384, 1536, 384, trains=True)


def test_in_training_no_matrix_of_the_weights_size_is_kept() -> None:
    """What autograd saves of a pass through both projections of an FFN, by its elements."""
    made = attached(classifier(intermediate_size=4096), HiWiConfig(parameters="weight", r=2))
    shapes: list[int] = []
    held = {p.untyped_storage().data_ptr() for p in made.parameters()}

    def noted(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in held:
            shapes.append(t.numel())
        return t

    x = torch.randn(3, 4096)
    with torch.autograd.graph.saved_tensors_hooks(noted, lambda t: t):
        layers(made)[1](x).sum()
    assert max(shapes) < 4096 * 32


def test_experts_and_models_without_ffns_are_told_from_what_it_needs() -> None:
    with pytest.raises(InputError, match="say where to work with target_modules"):
        get_peft_model(nn.Sequential(nn.Linear(3, 3)), HiWiConfig())
    made = get_peft_model(nn.Sequential(nn.Linear(3, 3)), HiWiConfig(target_modules=["0"]))
    assert len(layers(made)) == 1


REFUSED = [
    ({"r": 0}, "r is 0: HiWi needs a rank of 1 or more"),
    ({"parameters": "all"}, "parameters is 'all': choose bias, weight or both"),
    ({"act_fn": "nonsense"}, "act_fn is 'nonsense', which is no name"),
    ({"scaling": 0.0}, "scaling is 0.0: it has to be a finite number other than 0"),
    ({"target_modules": ["LayerNorm"]}, "is a LayerNorm: HiWi works in linear projections"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_is_refused_in_a_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        get_peft_model(classifier(), HiWiConfig(**options))
    assert "\n" not in str(caught.value)


def test_biases_of_which_nothing_can_be_made_are_refused() -> None:
    with pytest.raises(InputError, match="without biases, or with zeros: choose parameters='weight'"):
        get_peft_model(gpt2(zero=True), HiWiConfig())
