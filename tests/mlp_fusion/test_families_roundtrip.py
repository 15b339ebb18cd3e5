"""Small real models, one for each way in which FFNs lie, there and back; and that a mistake on the way is seen.

`make families-roundtrip` does the same for every model type of transformers.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import round_trips
import shrinking
import torch
import tying
from guessing import find_probes, tensors
from round_trips import SAME, DifferentError, Trip, prepare, round_trip
from tiny_configs import TINY, tiny
from transformers import CONFIG_MAPPING

import mlp_fusion
from mlp_fusion.families import building
from mlp_fusion.families.describe import describe

#: One for each way: what lies there.
TYPES = {
    "gpt2": "transposed, biased",
    "opt": "in the layer itself",
    "phi3": "gate and up in one matrix",
    "qwen3_moe": "stacked experts",
    "gpt_oss": "interleaved experts, biased, transposed",
    "dbrx": "experts one after another on one axis",
    "swin": "widths by a ratio, one for each stage",
    "clip": "two stacks, of which one sees images",
    "albert": "one FFN in many layers",
}


def figures(trip: Trip) -> dict[str, float]:
    return {name: trip.figures[name] for name in ("in memory", "parameters", "loaded", "restored")}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_a_model_comes_through_all_stages_and_mistakes_are_noticed(model_type: str) -> None:
    with building.undisturbed():
        trip = prepare(model_type)
        round_trip(trip)
    assert trip.done == ["fused", "loaded", "restored", "trained", "controlled"]
    assert trip.paths == trip.reached
    assert max(figures(trip).values()) <= SAME
    assert trip.figures["trained"] == len(trip.paths)
    assert [name for name, how in trip.figures["controls"].items() if how.startswith(round_trips.UNNOTICED)] == []
    assert "axis" in trip.figures["controls"] or model_type == "dbrx"


@pytest.fixture
def bert() -> Trip:
    with building.undisturbed():
        return prepare("bert")


def test_what_is_not_what_it_was_is_reported(bert: Trip, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    fuse = mlp_fusion.fuse

    def spoiled(model: Any, *args: Any, **kwargs: Any) -> None:
        fuse(model, *args, **kwargs)
        with torch.no_grad():
            model.encoder.layer[0].output.dense.weight[0, 0] += 0.1

    with building.undisturbed():
        monkeypatch.setattr(mlp_fusion, "fuse", spoiled)
        with pytest.raises(DifferentError, match="outputs in memory differ by"):
            round_trips.fuse(bert)
        # The spoiled model is saved and loaded as it is: its outputs stay, its parameters are not what they must be.
        with pytest.raises(DifferentError, match="parameters after loading differ by"):
            round_trips.save_and_load(bert, str(tmp_path))


def test_another_parameter_that_changes_is_named(bert: Trip, tmp_path: Any) -> None:
    with building.undisturbed():
        round_trips.fuse(bert)
        with torch.no_grad():
            bert.model.pooler.dense.bias[0] += 1e-3
        with pytest.raises(DifferentError, match=r"pooler\.dense\.bias, which belongs to no FFN"):
            round_trips.save_and_load(bert, str(tmp_path))


def test_an_ffn_that_does_not_learn_is_named(bert: Trip) -> None:
    with building.undisturbed():
        round_trips.fuse(bert)
        for parameter in bert.model.encoder.layer[1].parameters():
            parameter.requires_grad_(False)
        with pytest.raises(DifferentError, match=r"nothing in encoder\.layer\.1 is trained"):
            round_trips.train(bert)


@pytest.mark.parametrize("model_type", ["gpt2", "phi3", "gpt_oss", "qwen3_moe", "deepseek_v3"])
def test_tied_neurons_are_equal_in_the_raw_parameters_and_merge_to_half(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type](**TINY[model_type])
    description = tiny(model_type)
    model = tying.real_model(config)
    fresh = copy.deepcopy(model)
    tying.tie(model, description)
    for site, path in tying.instances(description):
        half = tying.kept(site, description.sites)
        before, after = (tying.neurons(m, site, path, site.width) for m in (fresh, model))
        assert torch.equal(after.ins[:, half:], after.ins[:, : site.width - half])
        assert torch.equal(after.outs[:, half:], after.outs[:, : site.width - half])
        assert torch.equal(after.ins[:, :half], before.ins[:, :half])
        wanted = tying.merged(after, half)
        order = torch.randperm(half, generator=torch.Generator().manual_seed(0))
        assert tying.difference(tying.Neurons(wanted.ins[:, order], wanted.outs[:, order]), wanted) == 0.0
        assert tying.difference(tying.Neurons(wanted.ins, wanted.outs[:, order]), wanted) > 0.1
        assert wanted.outs[:, 0].allclose(2 * before.outs[:, 0])


def test_the_neurons_of_gpt_oss_are_read_where_its_own_code_has_them() -> None:
    config = CONFIG_MAPPING["gpt_oss"](**TINY["gpt_oss"])
    model = tying.real_model(config)
    site, path = next(tying.instances(tiny("gpt_oss")))
    experts = model.get_submodule(path)
    found = tying.neurons(model, site, path, site.width)
    gate, up = experts.gate_up_proj[..., ::2], experts.gate_up_proj[..., 1::2]  # (experts, inputs, neurons)
    d = gate.shape[1]
    assert torch.equal(found.ins[..., :d], gate.transpose(1, 2))
    assert torch.equal(found.ins[..., d], experts.gate_up_proj_bias[:, ::2])
    assert torch.equal(found.ins[..., d + 1 : 2 * d + 1], up.transpose(1, 2))
    assert torch.equal(found.outs, experts.down_proj)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "t5", "gemma2"])
def test_a_small_config_has_all_kinds_of_parameters_and_of_ffns(model_type: str) -> None:
    with building.undisturbed():
        small = next(shrinking.small_configs(model_type))
        config = shrinking.default_config(model_type)
        full = building.build(building.model_class(config), config)
        model = building.build(building.model_class(small.config), small.config)
        assert {building.pattern(n) for n in building.shapes(full)} == {
            building.pattern(n) for n in building.shapes(model)
        }
        assert small.parameters < shrinking.WANTED < sum(p.numel() for p in full.parameters())
        again = shrinking.only_candidate(model_type, shrinking.steps_of(small.record()))
        assert again.config.to_dict() == small.config.to_dict()
        assert {site.kind for site in describe(small.config).sites} == {site.kind for site in describe(config).sites}


def test_guessed_inputs_put_as_many_tokens_into_a_text_as_an_image_needs() -> None:
    with building.undisturbed():
        config = shrinking.only_candidate("llava", shrinking.Steps(2, 16, False, 4, 512)).config
        model = tying.real_model(config)
        wanted = {"vision_tower.encoder.layers.0.mlp", "language_model.layers.1.mlp"}
        probes, _ = find_probes(model, wanted)
        assert [(probe.path, probe.reached) for probe in probes] == [("", wanted)]
        ids = probes[0].inputs["input_ids"]
        assert int((ids == config.image_token_id).sum()) == (336 // 14) ** 2
        assert "logits" in tensors(model(**probes[0].inputs)) or "last_hidden_state" in tensors(
            model(**probes[0].inputs)
        )
