"""Names of tensors on disk, and the parameters that they become."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from discovered_models import model_of

import checkpoints as ck
from families import tiny_model
from mlp_fusion.store.coverage import ffn_tensors, meta_model
from mlp_fusion.store.naming import Place, places
from mlp_fusion.store.record import architecture_of


@pytest.mark.parametrize("name", ["GPTNeoXConfig", "T5Config", "BartConfig", "AlbertConfig", "Phi3Config"])
def test_names_of_models_that_are_stored_as_they_are(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    model.save_pretrained(tmp_path)
    found = places(meta_model(model.config), ck.tensors(tmp_path))
    assert found.keys() == ck.tensors(tmp_path).keys()
    held = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for stored, place in found.items():
        assert place == Place("lm_head.weight" if stored == "embed_out.weight" else stored, converted=False)
        assert ck.tensors(tmp_path)[stored].shape == held[place.parameter].shape
    sites = architecture_of(model.config).sites(model)
    ffns = {f"{site.path}.{below}" for site in sites for below in site.kind.parameters}
    assert ffn_tensors(model.config, found) == ffns


def test_experts_are_stacked_when_they_are_loaded(tmp_path: Path) -> None:
    model = model_of("Qwen3MoeConfig")
    model.save_pretrained(tmp_path)
    names = ck.tensors(tmp_path)
    found = places(meta_model(model.config), names)
    assert found.keys() == names.keys()
    parameters = set(dict(model.named_parameters()))
    assert {place.parameter for place in found.values()} == parameters
    stacked = {name for name, place in found.items() if place.converted}
    assert len(stacked) == 3 * 4
    assert {found[name].parameter.rpartition(".")[2] for name in stacked} == {"gate_up_proj", "down_proj"}
    for name in stacked:
        expert = name.split(".experts.")[1].split(".")[0]
        assert expert in "0123"
    dense = {f"model.layers.0.mlp.{role}_proj.weight" for role in ("gate", "up", "down")}
    assert ffn_tensors(model.config, names) == stacked | dense


def test_prefixes_and_old_names() -> None:
    bert = meta_model(tiny_model("bert").config)  # a base model: the config names no class
    assert type(bert).__name__ == "BertModel"
    names = [
        "bert.encoder.layer.0.output.dense.weight",
        "encoder.layer.1.output.LayerNorm.gamma",
        "bert.encoder.layer.0.output.LayerNorm.beta",
        "cls.predictions.bias",
        "encoder.layer.7.output.dense.weight",
    ]
    assert places(bert, names) == {
        names[0]: Place("encoder.layer.0.output.dense.weight", False),
        names[1]: Place("encoder.layer.1.output.LayerNorm.weight", False),
        names[2]: Place("encoder.layer.0.output.LayerNorm.bias", False),
    }
    gpt2 = tiny_model("gpt2", task="CausalLM")
    assert isinstance(gpt2, transformers.GPT2LMHeadModel)
    assert places(gpt2, ["h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_fc.weight", "wte.weight"]) == {
        "h.0.mlp.c_fc.weight": Place("transformer.h.0.mlp.c_fc.weight", False),
        "transformer.h.0.mlp.c_fc.weight": Place("transformer.h.0.mlp.c_fc.weight", False),
        "wte.weight": Place("transformer.wte.weight", False),
    }
