"""Fused models of every form in training code: compiled, checkpointed, under autocast, copied, with adapters."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from fused_forms import FORMS, fused_model, tokens
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from mlp_fusion.modules import FusedExperts, FusedFFN, Scaled, ScaledActivation, ScaledWeights
from mlp_fusion.store.record import architecture_of

pytestmark = pytest.mark.slow

_CLASSES = {
    "module": FusedFFN, "activation": ScaledActivation, "projection": ScaledWeights, "weights": ScaledWeights,
    "experts": FusedExperts,
}  # fmt: skip
every_form = pytest.mark.parametrize("form", list(FORMS))


def run(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs, and the gradients of their mean square."""
    model.zero_grad()
    y = model(tokens())[0]
    y.square().mean().backward()
    return y.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(found: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]], rtol: float = 1e-4) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=rtol, atol=rtol * float(wanted[0].abs().max()))
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[1][name], gradient, rtol=rtol, atol=rtol * scale, msg=name)


@every_form
def test_the_scale_lies_where_the_form_says(form: str) -> None:
    model = fused_model(form)
    architecture = architecture_of(model.config)
    for site in architecture.sites(model):
        assert site.kind.form == form
        fused = architecture.fused(site)
        assert isinstance(fused, _CLASSES[form])
        assert fused.scale is not None
        assert f"{site.path}.{site.kind.scale}" in model.state_dict()


@every_form
def test_copies_and_pickles_train_alike(form: str) -> None:
    model = fused_model(form)
    wanted = run(model)
    same(run(copy.deepcopy(model)), wanted, 0.0)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    same(run(torch.load(file, weights_only=False)), wanted, 0.0)


@every_form
def test_what_a_copy_learns_stays_with_it(form: str) -> None:
    model = fused_model(form)
    before = run(model)[0]
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    run(other)
    optimizer.step()
    assert not torch.equal(run(other)[0], before)
    assert torch.equal(run(model)[0], before)


@every_form
def test_activation_checkpointing_gives_the_same_gradients(form: str) -> None:
    model = fused_model(form)
    wanted = run(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    same(run(model), wanted)


@every_form
def test_compiled_modules_compute_the_same(form: str) -> None:
    model = fused_model(form)
    wanted = run(model)
    for part in model.modules():
        if isinstance(part, nn.ModuleList):
            for layer in part:
                layer.compile(backend="aot_eager")
    torch._dynamo.reset()
    same(run(model), wanted)


@every_form
def test_autocast_takes_the_scale_along(form: str) -> None:
    model = fused_model(form)
    wanted = run(model)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = model(tokens())[0].float().detach()
    assert float((found - wanted).norm() / wanted.norm()) < 0.03


@pytest.mark.parametrize("form", ["module", "activation"])
def test_adapters_on_all_projections_merge_exactly(form: str) -> None:
    model = get_peft_model(fused_model(form), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    model.eval()
    before = model(tokens())[0].detach()
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tokens())[0].detach(), before, rtol=1e-4, atol=1e-4)
    assert any(isinstance(part, Scaled) and part.scale is not None for part in merged.modules())


@pytest.mark.parametrize("form", ["weights", "experts"])
def test_adapters_on_stacks_of_experts_merge_exactly(form: str) -> None:
    # These change the weights themselves, before the scale multiplies them.
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapters = LoraConfig(target_modules=[], target_parameters=names, init_lora_weights=False)
    model = get_peft_model(fused_model(form), adapters).eval()
    before = model(tokens())[0].detach()
    assert not torch.allclose(before, fused_model(form)(tokens())[0], rtol=1e-2)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tokens())[0].detach(), before, rtol=1e-4, atol=1e-4)


def test_adapters_pass_by_a_projection_that_is_scaled_when_it_is_used() -> None:
    model = fused_model("projection")
    holders = {name for name, part in model.named_modules() if isinstance(part, Scaled)}
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    found = {
        name.removeprefix("base_model.model.") for name, part in adapted.named_modules() if hasattr(part, "lora_A")
    }
    assert found
    assert not {name for name in found if any(f"{name}.".startswith(f"{holder}.") for holder in holders)}
