"""Models of every form: found, proved, fused, trained, saved, reloaded and restored."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from discovered_models import ADAM_ONLY, MODELS, auto, batch_of, fused_ffns, logits, model_of, tied
from moe_models import moe_model

import checkpoints as ck
import mlp_fusion
from families import token_batch
from mlp_fusion import InputError
from mlp_fusion.families import Kind
from mlp_fusion.families.discovered import discovered
from mlp_fusion.finetuning import loading
from mlp_fusion.measure import compare_models
from mlp_fusion.modules import FusedExperts, FusedFFN, Scaled, ScaledActivation, ScaledWeights
from mlp_fusion.store import states
from mlp_fusion.store.record import architecture_of, fusion_record, known_architecture

pytestmark = pytest.mark.slow

CLASSES = {"module": FusedFFN, "experts": FusedExperts, "activation": ScaledActivation, "projection": ScaledWeights,
           "weights": ScaledWeights}  # fmt: skip
#: Those whose widths no key of the config states.
UNTOLD = ("BloomConfig",)
IN_PLACE = [name for name, (form, _) in MODELS.items() if form in ("activation", "projection", "weights")]


def close(found: Any, exact: Any) -> None:
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_family_goes_all_the_way(name: str, tmp_path: Path) -> None:
    model = tied(name)
    exact, names = logits(model), set(model.state_dict())
    planned = mlp_fusion.plan(model, 0.5)
    architecture = architecture_of(model.config)
    form = MODELS[name][0]
    assert architecture.kinds[0].form == form
    report = mlp_fusion.fuse(model, 0.5, optimizer="adamw" if name in ADAM_ONLY or len(name) % 2 else "sgd")
    sites = architecture.sites(model)
    assert [row.path for row in report.rows] == [site.path for site in sites]
    assert all(isinstance(architecture.fused(site), CLASSES[site.kind.form]) for site in sites)
    close(logits(model), exact)
    assert planned.parameters_after == sum(p.numel() for p in model.parameters()) == report.parameters_after
    assert set(model.state_dict()) - names == {f"{site.path}.{site.kind.scale}" for site in sites}
    assert names <= set(model.state_dict())
    assert ("widths" in fusion_record(model.config)) is (name in UNTOLD)  # type: ignore[operator]

    model(**batch_of(model)).loss.backward()
    for site in sites:
        assert site.neurons == site.kind.width // 2
        for below in site.kind.parameters:
            gradient = site.module.get_parameter(below).grad
            assert gradient is not None, f"{site.path}.{below}"
            assert gradient.abs().max() > 0, f"{site.path}.{below}"

    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    close(logits(loaded), exact)
    plain = copy.deepcopy(loaded.state_dict())
    mlp_fusion.restore(loaded, tmp_path)
    assert [ffn.scale is not None for ffn in fused_ffns(loaded)] == [True] * len(sites)
    assert set(loaded.state_dict()) == set(model.state_dict())
    assert all(torch.allclose(value, model.state_dict()[key], atol=1e-5) for key, value in loaded.state_dict().items())
    close(logits(loaded), exact)
    with mlp_fusion.state_form("plain"):
        loaded.load_state_dict(plain, strict=False)
    close(logits(loaded), exact)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("name", sorted(IN_PLACE))
def test_ffns_narrowed_in_place_keep_everything_else(name: str, optimizer: str, tmp_path: Path) -> None:
    """Modules, dtypes, modes and what is frozen; and a scale that differs from neuron to neuron."""
    if optimizer == "sgd" and name in ADAM_ONLY:
        return
    # torch's grouped products of experts know no float64.
    dtype, tolerance = (torch.float32, 1e-5) if MODELS[name][0] == "weights" else (torch.float64, 1e-6)
    model = model_of(name).to(dtype).train()
    architecture = architecture_of(model.config)
    first = architecture.sites(model)[0]
    before = {path: type(module) for path, module in model.named_modules()}
    frozen = f"{first.path}.{first.kind.projection('w_in').parameter}"
    model.get_parameter(frozen).requires_grad_(False)
    mlp_fusion.fuse(model, 16, optimizer=optimizer)
    after = {path: type(module) for path, module in model.named_modules()}
    changed = {path for path in after if before.get(path) is not after[path]}
    holders = {f"{site.path}.{site.kind.holder}".rstrip(".") for site in architecture.sites(model)}
    inside = {f"{path}.activation" for path in holders if after[path] is ScaledActivation}
    assert changed == holders | inside
    assert all(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert [key for key, p in model.named_parameters() if not p.requires_grad] == [frozen]
    assert all(len(ffn.scale.unique()) > 1 for ffn in fused_ffns(model))
    assert {ffn.parameterization for ffn in fused_ffns(model)} == {"scaled" if optimizer == "adamw" else "split"}

    exact, own = logits(model.eval()), copy.deepcopy(model.state_dict())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype).eval()
    torch.testing.assert_close(logits(loaded), exact, rtol=tolerance, atol=tolerance)
    plain = copy.deepcopy(loaded.state_dict())
    mlp_fusion.restore(loaded, tmp_path)
    torch.testing.assert_close(logits(loaded), exact, rtol=tolerance, atol=tolerance)
    assert set(loaded.state_dict()) == set(own)
    with mlp_fusion.state_form("plain"):
        for path, part in _modules_of(plain, first):
            loaded.get_submodule(path).load_state_dict(part, strict=False)
    torch.testing.assert_close(logits(loaded), exact, rtol=tolerance, atol=tolerance)
    with mlp_fusion.state_form("own"):
        loaded.load_state_dict({key: t for key, t in own.items() if not key.endswith("scale")}, strict=False)
    torch.testing.assert_close(logits(loaded), exact, rtol=tolerance, atol=tolerance)
    with pytest.raises(InputError, match="the fused model's own"):
        loaded.load_state_dict(plain)


def _modules_of(plain: dict[str, Any], site: Any) -> list[tuple[str, dict[str, Any]]]:
    """The modules that hold the projections of an FFN, each with its part of a state."""
    paths = {f"{site.path}.{name}".rpartition(".")[0] for name in site.kind.parameters}
    return [
        (path, {key[len(path) + 1 :]: tensor for key, tensor in plain.items() if key.startswith(f"{path}.")})
        for path in sorted(paths)
    ]


@pytest.mark.parametrize("name", ["Olmo2Config", "Phi3Config", "OPTConfig", "BloomConfig", "EsmConfig", "T5Config",
                                  "AlbertConfig", "Qwen3MoeConfig", "GptOssConfig"])  # fmt: skip
def test_compress_and_verify(name: str, tmp_path: Path) -> None:
    source = tied(name)
    source.save_pretrained(tmp_path / "source")
    ck.add_tokenizer(tmp_path / "source", pad_token="<pad>")
    optimizer = "adamw" if name in ADAM_ONLY else "sgd"
    planned = mlp_fusion.plan(tmp_path / "source", 0.5)
    report = mlp_fusion.compress(tmp_path / "source", tmp_path / "out", 0.5, optimizer=optimizer)
    verified = mlp_fusion.verify(tmp_path / "out")
    assert verified.passed, verified.table()
    before, after = ck.tensors(tmp_path / "source"), ck.tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    loaded = auto(name).from_pretrained(tmp_path / "out")
    # Buffers that are saved are no parameters.
    assert planned.parameters_after == sum(t.numel() for key, t in after.items() if not key.endswith("inv_freq"))
    assert report.parameters_after == sum(p.numel() for p in loaded.parameters())
    close(logits(loaded), logits(source))
    mlp_fusion.restore(loaded, tmp_path / "out")
    close(logits(loaded), logits(source))


def test_layers_by_their_paths_and_the_keys_that_can_state_them(tmp_path: Path) -> None:
    """BART's decoder has a key of its own, T5's has not."""
    for name, key in (("BartConfig", "decoder_ffn_dim"), ("T5Config", None)):
        model = tied(name)
        exact = logits(model)
        report = mlp_fusion.fuse(model, 0.5, layers="decoder.*")
        assert [".decoder." in f".{row.path}" for row in report.rows] == [True, True]
        record: Any = fusion_record(model.config)
        assert ("widths" in record) is (key is None)
        if key is not None:
            assert (model.config.decoder_ffn_dim, model.config.encoder_ffn_dim) == (32, 64)
        else:
            assert model.config.d_ff == 64
            assert sorted(record["widths"].values()) == [32, 32]
        model.save_pretrained(tmp_path / name)
        loaded = auto(name).from_pretrained(tmp_path / name)
        close(logits(loaded), exact)
        mlp_fusion.restore(loaded, tmp_path / name)
        assert len(fused_ffns(loaded)) == 2
        close(logits(loaded), exact)


@pytest.mark.parametrize("name", ["GPTNeoXConfig", "Phi3Config", "EsmConfig", "GptOssConfig"])
def test_layers_of_different_widths(name: str, tmp_path: Path) -> None:
    model = tied(name)
    exact = logits(model)
    planned = mlp_fusion.plan(model, 0.5, layers="last:1")
    assert not planned.uniform
    mlp_fusion.fuse(model, 0.5, layers="last:1")
    close(logits(model), exact)
    model.save_pretrained(tmp_path)
    loaded = auto(name).from_pretrained(tmp_path)
    architecture = architecture_of(loaded.config)
    assert [site.neurons for site in architecture.sites(loaded)] == [64, 32]
    assert planned.parameters_after == sum(p.numel() for p in loaded.parameters())
    close(logits(loaded), exact)
    mlp_fusion.restore(loaded, tmp_path)
    assert [ffn.scale is not None for ffn in fused_ffns(loaded)] == [True]
    close(logits(loaded), exact)


def test_automatic_widths_of_a_model_without_a_key(tmp_path: Path) -> None:
    model = model_of("BloomConfig")
    text = [token_batch(seed=n) for n in range(4)]
    report = mlp_fusion.fuse(model, "auto", budget=0.6, calibration=text)
    widths = [row.neurons_after for row in report.rows]
    assert sum(widths) <= 0.6 * 256
    model.save_pretrained(tmp_path)
    loaded = auto("BloomConfig").from_pretrained(tmp_path)
    close(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"parts": ("second", "first")}, "does not compute what the 'phi3'"),
        ({"activation": "mlp.act"}, "layers.0.mlp has no mlp.act, where a part of its FFN is said to be"),
        ({"path": "layers.#"}, "no FFN found in Phi3ForCausalLM where the 'phi3' architecture has them"),
        ({"width": 32}, "model.layers.0.mlp has 64 neurons, its config says 32: mend the config"),
    ],
)
def test_wrong_entries_are_caught_before_anything_changes(
    change: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("Phi3Config")
    before = copy.deepcopy(model.state_dict())
    entry = discovered(model.config)
    (kind,) = entry.kinds
    if "parts" in change:
        halves = dict(zip(("w_gate", "w_in"), change["parts"], strict=True))
        projections = tuple(dataclasses.replace(p, part=halves.get(p.role, "whole")) for p in kind.projections)
        change = {"projections": projections}
    wrong = dataclasses.replace(entry, kinds=(dataclasses.replace(kind, **change),))
    monkeypatch.setattr("mlp_fusion.store.record.discovered", lambda config: wrong)
    with pytest.raises(InputError, match=reason) as caught:
        mlp_fusion.fuse(model, 16)
    assert "\n" not in str(caught.value)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_record_says_where_the_ffns_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`restore` and the forms of states need no discovery; a damaged record is refused."""
    model = model_of("GPTNeoXConfig")
    mlp_fusion.fuse(model, 16)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("mlp_fusion.families.discovered._discovered", None)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    mlp_fusion.restore(loaded, tmp_path)
    close(logits(loaded), logits(model))
    with pytest.raises(InputError, match="the fused model's own"):
        loaded.load_state_dict({k: v for k, v in loaded.state_dict().items() if not k.endswith("scale")})
    record: Any = fusion_record(loaded.config)
    (kind,) = record["kinds"]
    for wrong in (
        None, 3, [None], [{}], [{**kind, "projections": [{"parameter": "a"}]}], [{**kind, "function": "magic"}],
        [{**kind, "form": "magic"}], [{**kind, "path": None}], [{**kind, "key": {"path": "a", "color": 3}}],
        [{k: v for k, v in kind.items() if k != "width"}],
    ):  # fmt: skip
        damaged = copy.deepcopy(loaded.config)
        damaged.mlp_fusion = {**record, "kinds": wrong}
        with pytest.raises(InputError, match="does not say where the FFNs are"):
            known_architecture(damaged)


@pytest.mark.parametrize("name", ["GPTJConfig", "Phi3Config", "BartConfig", "Qwen3MoeConfig", "GptOssConfig"])
def test_an_architecture_survives_json(name: str) -> None:
    config = model_of(name).config
    entry = discovered(config)
    again = tuple(Kind.from_dict(json.loads(json.dumps(kind.to_dict()))) for kind in entry.kinds)
    assert again == entry.kinds
    assert architecture_of(config) is entry  # found once


def test_what_looks_for_fused_ffns_finds_those_narrowed_in_place() -> None:
    """Fine-tuning, loading and comparing; a projection that two roles share counts once."""
    original = model_of("Phi3Config")
    model = copy.deepcopy(original)
    mlp_fusion.fuse(model, 16, optimizer="sgd")
    assert states.has_forms(model)
    with pytest.raises(InputError, match="it is split, adamw needs scaled"):
        loading._check_in_memory(model, "model", "adamw")
    assert sum(p.numel() for p in loading.fused_parameters(model, [0])) == 3 * 16 * 32
    found = compare_models(original, model, token_batch(), samples=2)
    assert found.network is not None
    assert found.network.relative_error > 0
    same = compare_models(original, copy.deepcopy(original), token_batch(), samples=2)
    assert same.network is not None
    assert same.network.relative_error < 1e-5


@pytest.mark.parametrize("name", ["ModernBertConfig", "OPTConfig", "EsmConfig", "GptOssConfig"])
def test_chosen_neurons_have_no_scale(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    mlp_fusion.fuse(model, 16, method="prune", optimizer="sgd")
    assert [ffn.scale for ffn in fused_ffns(model)] == [None] * 2
    assert model.config.mlp_fusion["parameterization"] == "folded"
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "mlp_fusion" / "scale.safetensors").exists()
    torch.testing.assert_close(logits(auto(name).from_pretrained(tmp_path)), logits(model))


def test_forms_that_cannot_hold_a_scale_for_sgd_are_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("EsmConfig")
    # Not even the model is run.
    monkeypatch.setattr("mlp_fusion.verbs.fuse.learn", None)
    before = copy.deepcopy(model.state_dict())
    matched = {"method": "prune", "match": "auto", "calibration": [token_batch()]}
    for options in ({}, {"method": "mmd"}, matched):
        with pytest.raises(InputError, match=r"a function that no module holds.* use optimizer='adamw' or none"):
            mlp_fusion.fuse(model, 16, optimizer="sgd", **options)
    assert not any(isinstance(module, Scaled) for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_record_with_the_wrong_activation_is_refused(tmp_path: Path) -> None:
    model = model_of("OPTConfig")
    mlp_fusion.fuse(model, 16)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded.config.mlp_fusion["kinds"][0]["activation"] = "final_layer_norm"
    before = copy.deepcopy(loaded.state_dict())
    with pytest.raises(InputError, match=r"activation_fn\.scale fits no layer of the model"):
        mlp_fusion.restore(loaded, tmp_path)
    assert loaded.state_dict().keys() == before.keys()


def test_a_part_with_names_of_its_own_is_saved_folded_or_not_at_all(tmp_path: Path) -> None:
    """OPT's decoder is a model itself, in which the layers have other names."""
    model = model_of("OPTConfig")
    mlp_fusion.fuse(model, 16)
    with pytest.raises(InputError, match=r"OPTDecoder is a part of a fused model, .* save the whole model"):
        model.model.decoder.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_dropout_inside_is_kept() -> None:
    model = model_of("Starcoder2Config", residual_dropout=0.2)
    mlp_fusion.fuse(model, 16, sample=token_batch())
    exact = logits(model)
    model.train()
    torch.manual_seed(0)
    dropped = logits(model)
    assert not torch.allclose(dropped, exact)
    assert not any(isinstance(ffn, FusedFFN) for ffn in fused_ffns(model))


def test_what_is_not_proved_is_refused_with_the_reason() -> None:
    """BitNet's FFNs have a norm over their neurons."""
    config = transformers.BitNetConfig(**MODELS["GPTNeoXConfig"][1])
    message = (
        r"belongs to no FFN that could be proved \(.+\), which is not supported: `mlp-fusion families bitnet` shows"
    )
    for _ in range(2):
        with pytest.raises(InputError, match=message) as caught:
            discovered(config)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("method", ["obs", "select", "wanda"])
def test_experts_without_text_go_by_the_plain_method_where_the_one_asked_for_needs_some(
    method: str, sequential: bool
) -> None:
    learnt, plain = moe_model("Qwen3MoeConfig"), moe_model("Qwen3MoeConfig")
    text = [token_batch(seed=n) for n in range(2)]
    report = mlp_fusion.fuse(learnt, 0.5, calibration=text, method=method, sequential=sequential)
    mlp_fusion.fuse(plain, 0.5, method="fusion", optimizer=None)
    (row,) = [row for row in report.rows if row.path.endswith("experts")]
    assert row.by_weights
    for name in ("gate_up_proj", "down_proj"):
        both = [dict(model.get_submodule(row.path).named_parameters())[name] for model in (learnt, plain)]
        for expert in range(4):
            assert torch.equal(both[0][expert], both[1][expert]) is (expert in row.by_weights)


@pytest.mark.parametrize("method", ["auto", "fusion", "prune"])
def test_experts_without_text_stand_beside_those_whose_kernel_is_matched(method: str) -> None:
    learnt, plain = moe_model("Llama4TextConfig"), moe_model("Llama4TextConfig")
    text = [token_batch(seed=n) for n in range(3)]
    report = mlp_fusion.fuse(learnt, 0.5, calibration=text, method=method, match="auto")
    mlp_fusion.fuse(plain, 0.5, calibration=text, method=method)
    (row,) = [row for row in report.rows if row.path.endswith("experts")]
    assert row.by_weights
    assert len(row.by_weights) < 4
    assert row.largest_scale is not None
    found, expected = (model(**text[0]).logits for model in (learnt, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "batches"), [("Qwen3MoeConfig", 2), ("Llama4TextConfig", 6)])
def test_experts_that_few_tokens_reach_are_reduced_by_their_weights_alone(name: str, batches: int) -> None:
    """And the report says which."""
    learnt, plain = moe_model(name), moe_model(name)
    text = [token_batch(seed=n) for n in range(batches)]
    report = mlp_fusion.fuse(learnt, 0.5, calibration=text, match=None)
    mlp_fusion.fuse(plain, 0.5)
    (row,) = [row for row in report.rows if row.path.endswith("experts")]
    few, (site,) = row.by_weights, [s for s in architecture_of(learnt.config).sites(learnt) if s.kind.experts]
    assert few is not None
    assert 0 < len(few) < 4
    for expert in range(4):
        both = [model.get_submodule(site.path).gate_up_proj[expert] for model in (learnt, plain)]
        assert torch.equal(*both) is (expert in few)
    assert (report.settings.method, report.settings.sequential) == ("merge", False)
    assert f"reduced by their weights alone: {row.path}: {', '.join(map(str, few))}" in report.table()
    again = mlp_fusion.FusionReport.from_dict(report.to_dict())
    assert [found.by_weights for found in again.rows if found.path == row.path] == [few]
