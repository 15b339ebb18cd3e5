"""Functions and layouts are named rightly, wrong ones are caught, and the records say where neurons lie."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch
from tiny_configs import LLAMA, TINY, tiny, toy
from toy_transformer import ToyConfig, ToyModel
from transformers import CONFIG_MAPPING, LlamaConfig

from mlp_fusion.families import building
from mlp_fusion.families.calls import ways_to_call
from mlp_fusion.families.describe import describe
from mlp_fusion.families.functions import identify, take_half
from mlp_fusion.families.probe import LARGEST_ERROR, Log, probe_module, prove, prove_experts
from mlp_fusion.families.sites import Clamp, Site
from mlp_fusion.families.trace import Probe

#: Those whose models run on a few tokens or a small image, all FFNs proved.
SHUFFLED = [name for name in TINY if name not in ("bitnet", "gemma3n_text", "switch_transformers")]

_IDS = torch.arange(3, 15).unsqueeze(0)
_IMAGE = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)


def outputs(model: Any) -> torch.Tensor:
    """A model's first output on a few tokens, an image, or both."""
    inputs: dict[str, torch.Tensor] = {"input_ids": _IDS, "decoder_input_ids": _IDS, "pixel_values": _IMAGE}
    taken = inspect.signature(model.forward).parameters
    with torch.no_grad():
        found = model(**{name: value for name, value in inputs.items() if name in taken})
    return found.logits_per_image if "logits_per_image" in found else found[0]


def places(part: str, width: int) -> torch.Tensor:
    """Where the neurons of a part lie on its axis."""
    return {
        "whole": torch.arange(width), "first": torch.arange(width), "second": width + torch.arange(width),
        "even": 2 * torch.arange(width), "odd": 2 * torch.arange(width) + 1,
    }[part]  # fmt: skip


def shuffle(model: Any, site: Site, *, but: str = "") -> None:
    """Put the neurons of every instance in another order, as the record says they lie; but for the role `but`."""
    order = torch.randperm(site.width, generator=torch.Generator().manual_seed(1))
    for path, _ in site.instances:
        module = model.get_submodule(path)
        for projection in site.projections:
            if projection.role == but:
                continue
            tensors = [(module.get_parameter(projection.parameter), projection.neuron_axis)]
            if projection.bias is not None and projection.role != "w_out":
                tensors.append((module.get_parameter(projection.bias), -1))
            for tensor, axis in tensors:
                index = torch.arange(tensor.shape[axis])
                at = places(projection.part, site.width)
                index[at] = at[order]
                tensor.data = tensor.data.index_select(axis, index).contiguous()


@pytest.mark.parametrize("model_type", SHUFFLED)
def test_neurons_may_be_put_in_any_order_along_the_recorded_axes(model_type: str) -> None:
    found = tiny(model_type)
    config = CONFIG_MAPPING[model_type](**TINY[model_type])
    torch.manual_seed(0)
    model = building.model_class(config)._from_config(config).eval()
    for name, parameter in model.named_parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape) if "bias" in name else parameter.data * 3
    before = outputs(model)
    for site in found.sites:
        shuffle(model, site)
    torch.testing.assert_close(outputs(model), before, rtol=1e-4, atol=1e-4)
    for role in ["w_out", *(["w_gate"] if found.sites[-1].function.form == "gated" else [])]:
        shuffle(model, found.sites[-1], but=role)
        assert (outputs(model) - before).abs().max() > 1e-2, role


# --- functions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "parts", "activation"),
    [
        ("up first", ("second", "first"), "silu"),
        ("interleaved", ("even", "odd"), "silu"),
        ("clamped", ("first", "second"), "silu"),
        ("scaled", ("first", "second"), "relu"),
        ("unnamed", ("first", "second"), None),
    ],
)
def test_functions_and_layouts(layout: str, parts: tuple[str, str], activation: str | None) -> None:
    (site,) = toy(layout).sites
    assert tuple(p.part for p in site.projections) == (*parts, "whole")
    assert [p.role for p in site.projections] == ["w_gate", "w_in", "w_out"]
    function = site.function
    assert (function.form, function.activation) == ("gated", activation)
    assert function.clamp == (Clamp(5.0, "above") if layout == "clamped" else None)
    assert function.up_offset == (1 if layout == "clamped" else 0)
    assert function.factor == (0.25 if layout == "scaled" else 1)
    assert site.proof.error < LARGEST_ERROR


def real_ffn(layout: str) -> Probe:
    """The FFN of a toy layer with real weights."""
    model = building.build(ToyModel, ToyConfig(layout=layout))
    module = building.materialise(model.layers[0].ffn, set())
    x = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0))
    return Probe(module, lambda: module(x), x, "test")


@pytest.mark.parametrize("layout", ["up first", "interleaved", "clamped", "scaled"])
def test_the_proof_catches_swapped_halves_and_other_layouts(layout: str) -> None:
    probe = real_ffn(layout)
    (found,) = probe_module(probe.module, set(), Log())
    assert found.proved
    assert found.identified.halves is not None
    right = found.identified.halves
    for wrong in (("first", "second"), ("second", "first"), ("even", "odd"), ("odd", "even")):
        found.identified = dataclasses.replace(found.identified, halves=wrong)
        found.transposed.clear()
        prove(probe, found)
        assert found.error is not None
        assert (found.error < LARGEST_ERROR) == (wrong == right)
        assert wrong == right or found.error > 1e-2


def test_the_proof_catches_gate_and_up_in_the_wrong_order_and_a_wrong_axis() -> None:
    model = building.build(building.model_class(LlamaConfig()), LlamaConfig(**LLAMA))
    # As wide as its input: then no shape tells one axis from the other.
    config = LlamaConfig(**{**LLAMA, "intermediate_size": 32})
    square = building.build(building.model_class(config), config)
    for owner in (model, square):
        module = building.materialise(owner.layers[0].mlp, set())
        x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
        probe = Probe(module, lambda module=module, x=x: module(x), x, "test")
        (found,) = probe_module(module, set(), Log())
        assert found.proved
        assert found.identified.order == (0, 1)
        found.identified = dataclasses.replace(found.identified, order=(1, 0))
        found.transposed.clear()
        prove(probe, found)
        assert found.error is not None
        assert found.error > 1e-2
    (site,) = describe(config).sites
    assert [p.neuron_axis for p in site.projections] == [0, 0, 1]


@pytest.mark.parametrize("model_type", ["gpt_oss", "mixtral"])
def test_the_proof_of_a_stack_catches_a_wrong_axis(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type](**{**TINY[model_type], "intermediate_size": 32})
    model = building.build(building.model_class(config), config)
    with building.eager_experts(model):
        module = building.materialise(model.layers[0].mlp.experts, set())
    way = next(way for way in ways_to_call(module, True) if way.x.shape[-1] == 32)
    probe = Probe(module, way.call, way.x, way.how, way.arguments)
    (found,) = probe_module(module, set(), Log())
    assert found.proved
    # w_out is square: no shape tells one axis from the other.
    found.transposed[1] = not found.transposed[1]
    prove_experts(probe, found)
    assert found.experts["eager"] > 1e-2
    assert not found.proved


def test_halves_are_taken_along_any_axis() -> None:
    values = torch.arange(8).reshape(2, 4)
    assert take_half(values, "odd", 1).tolist() == [[1, 3], [5, 7]]
    assert take_half(values, "second", 0).tolist() == [[4, 5, 6, 7]]
    assert take_half(values, "whole", 0) is values


def test_an_attention_gate_is_no_function_of_one_product() -> None:
    model = building.build(ToyModel, ToyConfig())
    module = building.materialise(model.layers[0].attention, set())
    x = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0))
    probe = Probe(module, lambda: module(x), x, "test")
    products, _ = probe.run()
    named = {product.parameter: product for product in products}
    assert identify(probe, [named["gate.weight"]], named["o.weight"], []) is None
