"""FFNs are found by what they compute: one tiny config for each way in which they lie, and what is no FFN."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tiny_configs import BERT, LLAMA, TINY, tiny, toy
from toy_transformer import ToyConfig
from transformers import CONFIG_MAPPING, BertConfig, LlamaConfig

from mlp_fusion import InputError
from mlp_fusion.cli import cli
from mlp_fusion.families import building, catalogue
from mlp_fusion.families.describe import describe
from mlp_fusion.families.probe import LARGEST_ERROR
from mlp_fusion.families.sites import Clamp, Description, Site


def facts(site: Site) -> tuple[Any, ...]:
    """What matters of a site: where, how many, which kind, how wide, how it lies, the function, the key."""
    lies = " ".join(
        f"{p.parameter}[{p.neuron_axis}]{'' if p.part == 'whole' else f' {p.part}'}" for p in site.projections
    )
    key = site.width_keys[0].path if site.width_keys else None
    return site.path, len(site.instances), site.kind, site.width, lies, site.function.activation, key


_SPLIT = "gate_proj.weight[0] up_proj.weight[0] down_proj.weight[1]"
_STACK = "gate_up_proj[1] first gate_up_proj[1] second down_proj[2]"
_T5_LIES = "wi_0.weight[0] wi_1.weight[0] wo.weight[1]"
_CLIP_LIES = "fc1.weight[0] fc2.weight[1]"
FOUND: dict[str, list[tuple[Any, ...]]] = {
    "bert": [("encoder.layer.#", 2, "dense", 96, "intermediate.dense.weight[0] output.dense.weight[1]", "gelu",
              "intermediate_size")],
    "gpt2": [("h.#.mlp", 2, "dense", 96, "c_fc.weight[1] c_proj.weight[0]", "gelu_tanh", "n_inner")],
    "llama": [("layers.#.mlp", 2, "dense", 96, _SPLIT, "silu", "intermediate_size")],
    "phi3": [("layers.#.mlp", 2, "dense", 96,
              "gate_up_proj.weight[0] first gate_up_proj.weight[0] second down_proj.weight[1]", "silu",
              "intermediate_size")],
    "opt": [("decoder.layers.#", 2, "dense", 96, "fc1.weight[0] fc2.weight[1]", "relu", "ffn_dim")],
    "t5": [(f"{side}.block.#.layer.#.DenseReluDense", 2, "dense", 96, _T5_LIES, "gelu_tanh", "d_ff")
           for side in ("decoder", "encoder")],
    "modernbert": [("layers.#.mlp", 2, "dense", 96, "Wi.weight[0] first Wi.weight[0] second Wo.weight[1]", "gelu",
                    "intermediate_size")],
    "gpt_neox": [("layers.#.mlp", 2, "dense", 96, "dense_h_to_4h.weight[0] dense_4h_to_h.weight[1]", "gelu",
                  "intermediate_size")],
    "qwen3_moe": [("layers.#.mlp", 1, "dense", 96, _SPLIT, "silu", "intermediate_size"),
                  ("layers.#.mlp.experts", 1, "experts", 48, _STACK, "silu", "moe_intermediate_size")],
    "gpt_oss": [("layers.#.mlp.experts", 2, "experts", 96, "gate_up_proj[2] even gate_up_proj[2] odd down_proj[1]",
                 "quick_gelu", "intermediate_size")],
    "mixtral": [("layers.#.mlp.experts", 2, "experts", 96, _STACK, "silu", "intermediate_size")],
    "deepseek_v3": [("layers.#.mlp", 1, "dense", 96, _SPLIT, "silu", "intermediate_size"),
                    ("layers.#.mlp.experts", 1, "experts", 48, _STACK, "silu", "moe_intermediate_size"),
                    ("layers.#.mlp.shared_experts", 1, "shared", 48, _SPLIT, "silu", "moe_intermediate_size")],
    "vit": [("layers.#.mlp", 2, "dense", 96, _CLIP_LIES, "gelu", "intermediate_size")],
    "clip": [("text_model.encoder.layers.#.mlp", 2, "dense", 96, _CLIP_LIES, "quick_gelu",
              "text_config.intermediate_size"),
             ("vision_model.encoder.layers.#.mlp", 2, "dense", 128, _CLIP_LIES, "quick_gelu",
              "vision_config.intermediate_size")],
    "albert": [("encoder.albert_layer_groups.#.albert_layers.#", 1, "dense", 96,
                "ffn.weight[0] ffn_output.weight[1]", "gelu_tanh", "intermediate_size")],
}  # fmt: skip


@pytest.mark.parametrize("model_type", FOUND)
def test_every_layout_is_found_proved_and_keyed(model_type: str) -> None:
    found = tiny(model_type)
    assert [facts(site) for site in found.sites] == FOUND[model_type]
    assert found.refused == ()
    assert found.complete
    assert found.keyed
    for site in found.sites:
        assert max([site.proof.error, *site.proof.experts.values()]) < LARGEST_ERROR
        assert (site.d_in, site.d_out) == (32, 32)


def test_biases_stacks_clamps_and_offsets_are_recorded() -> None:
    (bert,), (gpt_oss,), (phi3,) = tiny("bert").sites, tiny("gpt_oss").sites, tiny("phi3").sites
    assert [p.bias for p in bert.projections] == ["intermediate.dense.bias", "output.dense.bias"]
    assert [p.bias for p in phi3.projections] == [None, None, None]
    assert [p.bias for p in gpt_oss.projections] == ["gate_up_proj_bias", "gate_up_proj_bias", "down_proj_bias"]
    assert [p.expert_axis for p in gpt_oss.projections] == [0, 0, 0]
    assert gpt_oss.function.clamp == Clamp(7.0, "above")
    assert gpt_oss.function.up_offset == 1
    assert {"eager"} <= set(gpt_oss.proof.experts)
    assert [site.own_module for site in (bert, gpt_oss, phi3)] == [False, True, True]


def test_groups_are_what_one_key_moves() -> None:
    dense, routed, shared = tiny("deepseek_v3").sites
    assert routed.group == shared.group != dense.group
    assert [key.path for key in shared.width_keys] == ["moe_intermediate_size"]
    decoder, encoder = tiny("t5").sites
    assert decoder.group == encoder.group
    text, vision = tiny("clip").sites
    assert text.group != vision.group


def test_experts_in_lists_are_found_in_every_layer() -> None:
    found = tiny("switch_transformers")
    assert {(site.kind, len(site.instances)) for site in found.sites} == {("dense", 1), ("experts", 3)}
    assert found.complete
    assert len({site.group for site in found.sites}) == 1


#: Some of what is looked at here is in newer versions alone.
OLD = "sam_mask_decoder" not in CONFIG_MAPPING
newer = pytest.mark.skipif(OLD, reason="transformers lacks the models")


@newer
def test_two_ffns_of_one_layer_and_a_stack_of_one_expert_are_found() -> None:
    config = CONFIG_MAPPING["instructblip_qformer"](**{**BERT, "encoder_hidden_size": 32})
    found = describe(config)
    assert [site.path for site in found.sites] == ["encoder.layer.#"] * 2
    assert {site.projections[0].parameter for site in found.sites} == {
        "intermediate.dense.weight", "intermediate_query.dense.weight"
    }  # fmt: skip
    assert found.complete
    # A shared expert may be narrow: a width key moves it, which moves no adapter.
    granite = CONFIG_MAPPING["granitemoehybrid"](
        **{**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 8,
           "mamba_n_heads": 8,
           "layer_types": ["attention"] * 2}
    )  # fmt: skip
    assert [(site.path, site.width) for site in describe(granite).sites] == [
        ("layers.#.block_sparse_moe.experts", 96), ("layers.#.shared_mlp", 8),
    ]  # fmt: skip
    moe = CONFIG_MAPPING["mixtral"](**{**LLAMA, "num_local_experts": 1, "num_experts_per_tok": 1})
    assert [facts(site) for site in describe(moe).sites] == FOUND["mixtral"]


def test_an_unset_key_is_learnt_and_a_shared_module_counts_once() -> None:
    config = CONFIG_MAPPING["gpt2"](**{**TINY["gpt2"], "n_inner": None})
    (site,) = describe(config).sites
    assert (site.width, site.width_keys[0].path, site.width_keys[0].kind) == (128, "n_inner", "unset")
    (site,) = describe(ToyConfig(layers=3, shared=True)).sites
    assert site.instances == (("layers.0.ffn", 0),)
    assert site.shared == ("layers.1.ffn", "layers.2.ffn")
    assert tiny("albert").sites[0].instances == (("encoder.albert_layer_groups.0.albert_layers.0", 0),)


def test_a_hard_coded_width_is_found_and_not_to_be_saved() -> None:
    found = tiny("bloom")
    (site,) = found.sites
    assert (site.width, site.width_keys) == (128, ())
    assert site.unsaved is not None
    assert "hard-coded" in site.unsaved
    assert found.complete
    assert not found.keyed


def test_a_norm_over_the_neurons_is_refused_with_its_reason() -> None:
    for found, names in ((tiny("bitnet"), 3), (toy("normed"), 2)):
        assert found.sites == ()
        assert len(found.refused) == names
        assert not found.complete
        for refusal in found.refused:
            assert "mixes channels" in refusal.reason
            assert refusal.key in ("intermediate_size", "ffn_width")


def test_a_norm_over_neurons_whose_width_no_key_moves_is_refused_too() -> None:
    found = toy("hidden")
    assert [(r.parameter, r.key, r.count) for r in found.refused] == [
        ("layers.#.ffn.a.weight", None, 2), ("layers.#.ffn.b.weight", None, 2),
    ]  # fmt: skip
    assert not found.complete


def test_sparse_layers_are_refused_though_their_like_is_proved() -> None:
    found = tiny("gemma3n_text")
    (site,) = found.sites
    assert [index for _, index in site.instances] == [1, 2, 3]
    assert {refusal.count for refusal in found.refused} == {1}
    assert not found.complete
    assert site.unsaved is not None


def test_a_state_space_model_is_refused() -> None:
    config = CONFIG_MAPPING["mamba"](vocab_size=40, hidden_size=32, num_hidden_layers=2, state_size=4)
    found = describe(config)
    assert found.sites == ()
    assert not found.complete
    (refusal,) = [refusal for refusal in found.refused if "mixer.out_proj.weight" in refusal.parameter]
    assert refusal.reason.startswith("a state-space layer, whose channels are its state's: ")


# --- what is no FFN ---------------------------------------------------------------------------------------------------


def test_only_the_ffn_of_a_layer_is_one() -> None:
    found = toy("plain")
    assert [facts(site) for site in found.sites] == [
        ("layers.#.ffn", 2, "dense", 40, "a.weight[0] b.weight[1]", "gelu", "ffn_width")
    ]
    assert found.refused == ()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("patches", "a convolution"),
        ("pooler", "a projector or a head"),
        ("layers.#.attention.k", "no activation lies between"),
        ("layers.#.adapter", "a bottleneck beside a wider FFN"),
    ],
)
def test_what_looks_like_an_ffn_is_set_apart_by_rule(path: str, words: str) -> None:
    (apart,) = [pair for pair in toy("plain").set_apart if pair.path == path]
    assert words in apart.reason


def test_attention_and_its_gate_are_not_even_set_apart() -> None:
    names = {f"{pair.path}.{name}" for pair in toy("plain").set_apart for name in pair.parameters}
    assert {name for name in names if ".attention." in name} == {f"layers.#.attention.k.{i}.weight" for i in (0, 1)}


def test_attention_that_is_wider_than_the_model_is_not_refused() -> None:
    found = describe(ToyConfig(more_heads=8))
    assert [site.path for site in found.sites] == ["layers.#.ffn"]
    assert found.refused == ()


def test_a_head_of_a_real_classifier_is_none() -> None:
    config = CONFIG_MAPPING["roberta"](**{**BERT, "pad_token_id": 0})
    config.architectures = ["RobertaForSequenceClassification"]
    found = describe(config)
    assert found.model_class == "RobertaForSequenceClassification"
    assert [site.path for site in found.sites] == ["roberta.encoder.layer.#"]
    assert [pair.path for pair in found.set_apart] == ["classifier"]


def test_an_ffn_that_something_else_enters_is_refused() -> None:
    found = toy("unlike")
    assert found.sites == ()
    assert {refusal.parameter for refusal in found.refused} >= {"layers.#.ffn.a.weight", "layers.#.ffn.b.weight"}


# --- how it behaves ---------------------------------------------------------------------------------------------------


def seed_all(seed: int) -> None:
    """Seed every global generator."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def test_nothing_is_changed_and_the_same_is_found_again() -> None:
    config = BertConfig(**BERT)
    before = json.dumps(config.to_dict(), sort_keys=True, default=str)
    seed_all(5)
    expected = torch.rand(1), random.random(), np.random.rand()
    seed_all(5)
    dtype = torch.get_default_dtype()
    first = describe(config)
    assert (torch.rand(1), random.random(), np.random.rand()) == expected
    assert json.dumps(config.to_dict(), sort_keys=True, default=str) == before
    assert torch.get_default_dtype() == dtype
    assert torch.is_grad_enabled()
    torch.manual_seed(6)
    assert describe(config) == first


def test_descriptions_go_through_json() -> None:
    for model_type in ("gpt_oss", "deepseek_v3", "bitnet", "gemma3n_text"):
        found = tiny(model_type)
        assert Description.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_a_large_model_is_described_without_its_memory() -> None:
    config = LlamaConfig(num_hidden_layers=2, hidden_size=8192, intermediate_size=28672, num_attention_heads=64)
    (site,) = describe(config).sites
    assert (site.width, site.d_in) == (28672, 8192)
    model = building.build(building.model_class(config), config)
    with pytest.raises(InputError, match="too many to make real"):
        building.materialise(model.layers[0].mlp, {f"{name}_proj.weight" for name in ("gate", "up", "down")})
    real = building.materialise(model.layers[0], set(), large=True)
    assert sum(p.untyped_storage().nbytes() for p in real.parameters()) < 10**6


def test_what_is_too_large_to_be_tried_is_refused_and_not_passed_over() -> None:
    config = CONFIG_MAPPING["bloom"](hidden_size=8192, n_layer=2, n_head=64, vocab_size=40)
    found = describe(config)
    assert found.sites == ()
    assert {refusal.parameter for refusal in found.refused} == {
        f"h.#.mlp.{name}.weight" for name in ("dense_h_to_4h", "dense_4h_to_h")
    }
    assert all("too many to make real" in refusal.reason for refusal in found.refused)


def test_a_config_that_builds_nothing_is_refused_in_one_line() -> None:
    config = BertConfig(**{**BERT, "num_attention_heads": 3})
    with pytest.raises(InputError, match=r"bert: transformers builds no BertModel from this config") as error:
        describe(config)
    assert "\n" not in str(error.value)
    if not OLD:
        with pytest.raises(InputError, match="no model class for this config"):
            describe(CONFIG_MAPPING["sam_mask_decoder"]())


@newer
@pytest.mark.slow
def test_what_the_catalogue_holds_is_needed_and_has_its_reason() -> None:
    assert set(catalogue.DEFAULTS) <= set(catalogue.model_types())
    for name, entry in catalogue.DEFAULTS.items():
        assert entry.reason
        assert entry.arguments
        with pytest.raises(InputError):
            describe(bare_config(name))
        building.build(building.model_class(config := catalogue.default_config(name)), config)
    with pytest.raises(InputError, match="neither a folder nor a model type"):
        catalogue.default_config("no-such-type")


def bare_config(model_type: str) -> Any:
    """The default config without the catalogue's arguments.

    Raises:
        InputError: it wants some itself.
    """
    try:
        return CONFIG_MAPPING[model_type]()
    except Exception as error:
        raise InputError(str(error)) from error


def test_the_command_line_says_what_is_found_and_refused(tmp_path: Any) -> None:
    CONFIG_MAPPING["bitnet"](**TINY["bitnet"]).save_pretrained(tmp_path)
    said = CliRunner().invoke(cli, ["families", str(tmp_path)])
    assert said.exit_code == 0
    assert "no FFN was found" in said.output
    assert "refused: layers.#.mlp.up_proj.weight (2, moved by intermediate_size)" in said.output
    CONFIG_MAPPING["gpt_oss"](**TINY["gpt_oss"]).save_pretrained(tmp_path)
    said = CliRunner().invoke(cli, ["families", str(tmp_path), "--json"])
    found = json.loads(said.output)
    assert found["complete"]
    assert found["keyed"]
    assert Description.from_dict(found) == dataclasses.replace(tiny("gpt_oss"))
    table = CliRunner().invoke(cli, ["families", str(tmp_path)]).output
    for words in ("interleaved", "stacked", "quick_gelu, gated, clamp", "intermediate_size"):
        assert words in table
    listed = json.loads(CliRunner().invoke(cli, ["families", "--json"]).output)["model_types"]
    assert {"bert", "gpt_oss"} <= set(listed)


@pytest.mark.parametrize("model_type", ["qwen3", "gpt_oss"])
def test_queries_wider_than_the_model_are_no_ffn_though_keys_are_fewer(model_type: str) -> None:
    """Of so few layers, the whole model is looked at; a norm lies between queries and the output."""
    config = CONFIG_MAPPING[model_type](
        vocab_size=40, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    # With a head in front of it, the whole model is a part.
    config.architectures = ["Qwen3ForCausalLM" if model_type == "qwen3" else "GptOssForCausalLM"]
    found = describe(config)
    assert found.complete, found.refused
    assert [site.module for site in found.sites] == ["Qwen3MLP" if model_type == "qwen3" else "GptOssExperts"]
