"""Families without an entry: found, proved, fused, saved, reloaded and restored."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import checkpoints as ck
import mlp_fusion
from families import token_batch
from mlp_fusion import InputError
from mlp_fusion.families import ARCHITECTURES, narrowing
from mlp_fusion.families.calls import Way
from mlp_fusion.families.discovered import DiscoveredArchitecture, discovered
from mlp_fusion.finetuning import loading
from mlp_fusion.measure import compare_models
from mlp_fusion.modules import FusedFFN, ScaledActivation
from mlp_fusion.store import states
from mlp_fusion.store.record import architecture_of, fusion_record, known_architecture

pytestmark = pytest.mark.slow

_SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 40, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
#: Config class -> its arguments: gated and plain, with biases and without, widths with a key of another name; the last
#: ones with gate and up in one projection, or with an FFN that lies in the layer.
MODELS: dict[str, dict[str, Any]] = {
    "GPTNeoXConfig": _SIZES,
    "PhiConfig": _SIZES,
    "Starcoder2Config": _GROUPED,
    "Gemma3TextConfig": {**_GROUPED, "head_dim": 8},
    "Olmo2Config": _SIZES,
    "SmolLM3Config": _GROUPED,
    "NemotronConfig": _GROUPED,
    "GPTJConfig": {
        "vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 40,
        "bos_token_id": 0, "eos_token_id": 2,
    },
    "Phi3Config": _SIZES,
    "Glm4Config": {**_GROUPED, "head_dim": 8},
    "ModernBertConfig": {**_SIZES, "cls_token_id": 0, "sep_token_id": 2, "mlp_dropout": 0.1},
    "OPTConfig": {**_SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "ElectraConfig": {**_SIZES, "embedding_size": 32},
}  # fmt: skip
IN_PLACE = ("ElectraConfig", "Glm4Config", "ModernBertConfig", "OPTConfig", "Phi3Config")


def model_of(name: str, **changes: Any) -> Any:
    config = getattr(transformers, name)(**{**MODELS[name], **changes})
    torch.manual_seed(0)
    return auto(name).from_config(config).eval()


def auto(name: str) -> Any:
    masked = name in ("ElectraConfig", "ModernBertConfig")
    return transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM


def fused_ffns(model: Any) -> list[Any]:
    architecture = architecture_of(model.config)
    return [found for site in architecture.sites(model) if (found := architecture.fused(site)) is not None]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**token_batch()).logits
    return found


def tied(name: str) -> Any:
    """A model whose FFNs hold 16 distinct neurons: they can be fused without loss."""
    model = model_of(name)
    for part in model.modules():
        widths = {n: p for n, p in part.named_parameters(recurse=False) if 4 * 32 in p.shape or 64 in p.shape}
        for parameter in widths.values():
            with torch.no_grad():
                for axis, length in enumerate(parameter.shape):
                    if length in (64, 128):
                        parameter.copy_(parameter.index_select(axis, torch.arange(length) % 16))
    return model


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_family_without_an_entry_goes_all_the_way(name: str, tmp_path: Path) -> None:
    model = tied(name)
    assert model.config.model_type not in ARCHITECTURES
    exact, names = logits(model), set(model.state_dict())
    planned = mlp_fusion.plan(model, 16)
    report = mlp_fusion.fuse(model, 16, optimizer="sgd" if name in ("Phi3Config", "OPTConfig") else "adamw")
    assert len(report.rows) == 2
    torch.testing.assert_close(logits(model), exact, rtol=1e-4, atol=1e-5)
    assert planned.parameters_after == sum(p.numel() for p in model.parameters())
    assert len(set(model.state_dict()) - names) == 2
    assert names <= set(model.state_dict())

    loss = model(**token_batch(), labels=token_batch()["input_ids"]).loss
    loss.backward()
    architecture = architecture_of(model.config)
    for site in architecture.sites(model):
        for role in architecture.projections:
            weight = architecture.projection(site, role).weight
            assert weight.grad is not None  # type: ignore[union-attr]
            assert weight.numel() == 16 * 32 * architecture.lengths(role)  # type: ignore[union-attr, operator]

    model.save_pretrained(tmp_path)
    loaded, info = auto(name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(loaded), exact, rtol=1e-4, atol=1e-5)
    plain = loaded.state_dict()
    mlp_fusion.restore(loaded, tmp_path)
    assert [ffn.scale is not None for ffn in fused_ffns(loaded)] == [True, True]
    assert all(torch.allclose(value, model.state_dict()[key], atol=1e-6) for key, value in loaded.state_dict().items())
    torch.testing.assert_close(logits(loaded), exact, rtol=1e-4, atol=1e-5)
    with mlp_fusion.state_form("plain"):
        loaded.load_state_dict(plain, strict=False)
    torch.testing.assert_close(logits(loaded), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_ffns_narrowed_in_place_keep_everything_else(name: str, optimizer: str, tmp_path: Path) -> None:
    """Modules, dtypes, modes and what is frozen; and a scale that differs from neuron to neuron."""
    model = model_of(name).double().train()
    architecture = architecture_of(model.config)
    before = {path: type(module) for path, module in model.named_modules()}
    frozen = f"{architecture.sites(model)[0].path}.{architecture.projections['w_in']}.weight"
    model.get_parameter(frozen).requires_grad_(False)
    mlp_fusion.fuse(model, 16, optimizer=optimizer)
    after = {path: type(module) for path, module in model.named_modules()}
    changed = {path for path in after if before.get(path) is not after[path]}
    holders = {f"{site.path}.{architecture.holder}" for site in architecture.sites(model)}
    assert changed == holders | {f"{path}.activation" for path in holders}
    assert all(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert [key for key, p in model.named_parameters() if not p.requires_grad] == [frozen]
    assert all(isinstance(ffn, ScaledActivation) and len(ffn.scale.unique()) > 1 for ffn in fused_ffns(model))
    assert {ffn.parameterization for ffn in fused_ffns(model)} == {"scaled" if optimizer == "adamw" else "split"}

    exact, own = logits(model.eval()), copy.deepcopy(model.state_dict())
    model.save_pretrained(tmp_path)
    loaded = auto(name).from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(logits(loaded), exact)
    plain = copy.deepcopy(loaded.state_dict())
    mlp_fusion.restore(loaded, tmp_path)
    torch.testing.assert_close(logits(loaded), exact)
    assert set(loaded.state_dict()) == set(own)
    layer, path = architecture.sites(loaded)[0].layer, architecture.projections["w_out"]
    part = {key.removeprefix(frozen.split(f"{architecture.projections['w_in']}.")[0]): t for key, t in plain.items()}
    part = {key.removeprefix(f"{path}."): t for key, t in part.items() if key.startswith(f"{path}.")}
    with mlp_fusion.state_form("plain"):
        layer.get_submodule(path).load_state_dict(part)
    torch.testing.assert_close(logits(loaded), exact)
    with mlp_fusion.state_form("own"):
        loaded.load_state_dict({key: t for key, t in own.items() if not key.endswith("scale")}, strict=False)
    torch.testing.assert_close(logits(loaded), exact)
    with pytest.raises(InputError, match="the fused model's own"):
        loaded.load_state_dict(plain)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"parts": {"w_gate": "second", "w_in": "first", "w_out": "whole"}}, "does not compute what the 'phi3'"),
        ({"activation_path": "resid_mlp_dropout"}, "resid_mlp_dropout, a Dropout, does not compute silu"),
        ({"activation_path": "mlp.down_proj"}, "mlp.down_proj, a Linear, does not compute silu"),
        ({"activation_path": "mlp.act"}, "layers.0 has no mlp.act, where the FFN is said to be"),
    ],
)
def test_wrong_entries_are_caught_before_anything_changes(
    change: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("Phi3Config")
    before = copy.deepcopy(model.state_dict())
    wrong = dataclasses.replace(discovered(model.config), **change)
    monkeypatch.setattr("mlp_fusion.store.record.discovered", lambda config: wrong)
    with pytest.raises(InputError, match=reason) as caught:
        mlp_fusion.fuse(model, 16)
    assert "\n" not in str(caught.value)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class _Odd(nn.Module):
    """A gated FFN with gate and up in one projection; `kind` says what is unusual about it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.width = kind, 24
        self.both, self.down = nn.Linear(8, 48), nn.Linear(24, 8)
        self.act = nn.SiLU()
        if kind == "two names":
            self.same = self.act

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).split(24 if self.kind == "width" else self.both.out_features // 2, -1)
        if self.kind == "function":
            return self.down(nn.functional.silu(gate) * up)  # type: ignore[no-any-return]
        if self.kind == "mean":
            return self.down(self.act(gate) * up * (self.down.in_features / 24))  # type: ignore[no-any-return]
        return self.down(self.act(gate) * up)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("usual", None),
        ("function", "have no module that is their activation"),
        ("two names", r"have 2 modules that may be their activation \(act, same\)"),
        ("width", "do not run with fewer neurons"),
        ("mean", "compute something else once they are narrower"),
    ],
)
def test_the_activation_is_found_by_watching(kind: str, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"w_gate": "first", "w_in": "second", "w_out": "whole"}
    entry = DiscoveredArchitecture(
        ("odd",), "", "layers", "", {"w_gate": "both", "w_in": "both", "w_out": "down"}, "", function="silu",
        parts=parts,
    )  # fmt: skip
    torch.manual_seed(0)
    module, x = _Odd(kind), torch.randn(3, 8)
    monkeypatch.setattr(narrowing, "_small", lambda *_: (module, Way("", lambda: module(x), x)))
    site: Any = None
    if reason is None:
        assert narrowing.find_activation(None, site, entry) == "act"
        return
    with pytest.raises(InputError, match=reason):
        narrowing.find_activation(None, site, entry)


@pytest.mark.parametrize("name", ["SmolLM3Config", "Phi3Config", "OPTConfig"])
def test_compress_and_verify(name: str, tmp_path: Path) -> None:
    tied(name).save_pretrained(tmp_path / "source")
    ck.add_tokenizer(tmp_path / "source", pad_token="<pad>")
    mlp_fusion.compress(tmp_path / "source", tmp_path / "out", 16, optimizer="sgd")
    assert mlp_fusion.verify(tmp_path / "out").passed
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(tied(name)), rtol=1e-4, atol=1e-5)


def test_the_record_says_where_the_ffns_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`restore` and the forms of states need no discovery; a damaged record is refused."""
    model = model_of("GPTNeoXConfig")
    mlp_fusion.fuse(model, 16)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("mlp_fusion.families.discovered._discovered", None)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    mlp_fusion.restore(loaded, tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="the fused model's own"):
        loaded.load_state_dict({k: v for k, v in loaded.state_dict().items() if not k.endswith("scale")})
    record = fusion_record(loaded.config)
    assert record is not None
    for wrong in (
        None, 3, {}, {**record["ffn"], "projections": {"w_in": "a"}}, {**record["ffn"], "function": "magic"},
        {**record["ffn"], "parts": None}, {**record["ffn"], "parts": {"w_in": "first", "w_out": "whole"}},
        {**record["ffn"], "activation_path": None}, {**record["ffn"], "module": ""},
        {**record["ffn"], "projections": {"w_in": "a", "w_out": "a"}},
    ):  # fmt: skip
        damaged = copy.deepcopy(loaded.config)
        damaged.mlp_fusion = {**record, "ffn": wrong}
        with pytest.raises(InputError, match="does not say where the FFNs are"):
            known_architecture(damaged)


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


@pytest.mark.parametrize("name", ["ModernBertConfig", "OPTConfig"])
def test_chosen_neurons_have_no_scale(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    mlp_fusion.fuse(model, 16, method="prune")
    assert [(ffn.scale, ffn.parameterization) for ffn in fused_ffns(model)] == [(None, "scaled")] * 2
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "mlp_fusion" / "scale.safetensors").exists()
    torch.testing.assert_close(logits(auto(name).from_pretrained(tmp_path)), logits(model))


def test_a_record_with_the_wrong_activation_is_refused(tmp_path: Path) -> None:
    model = model_of("OPTConfig")
    mlp_fusion.fuse(model, 16)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded.config.mlp_fusion["ffn"]["activation_path"] = "final_layer_norm"
    before = copy.deepcopy(loaded.state_dict())
    with pytest.raises(InputError, match=r"activation_fn\.scale fits no layer of the model"):
        mlp_fusion.restore(loaded, tmp_path)
    assert loaded.state_dict().keys() == before.keys()


def test_a_part_without_its_place_is_not_saved(tmp_path: Path) -> None:
    """OPT's decoder is a model itself, in which the layers have other names: its scale would not be folded."""
    model = model_of("OPTConfig")
    mlp_fusion.fuse(model, 16)
    with pytest.raises(InputError, match=r"OPTDecoder is a part of a fused model, .* save the whole model"):
        model.model.decoder.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_entry_survives_json() -> None:
    config = model_of("GPTJConfig").config
    entry = discovered(config)
    again = DiscoveredArchitecture.of_record("gptj", json.loads(json.dumps(entry.kept())))
    assert again.kept() == entry.kept()
    assert (entry.width(config), entry.width_key, entry.function) == (128, "n_inner", "gelu_tanh")
    assert architecture_of(config) is entry  # found once


REFUSED = {
    "T5Config": ({}, "its FFNs are of 2 kinds"),
    "AlbertConfig": ({"embedding_size": 32}, "do not lie in one stack of layers"),
    "BloomConfig": ({}, "have no width that the config can state"),
    "ImageGPTConfig": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64}, "have transposed projections"),
    "Qwen3MoeConfig": (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_key_value_heads": 2},
        "are experts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_other_shapes_are_refused_with_the_reason(name: str) -> None:
    extra, reason = REFUSED[name]
    config = getattr(transformers, name)(**{**_SIZES, **extra})
    with pytest.raises(InputError, match=reason) as caught:
        discovered(config)
    assert "\n" not in str(caught.value)


def test_a_dropout_inside_is_refused_before_anything_changes() -> None:
    model = model_of("Starcoder2Config", residual_dropout=0.2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="has a dropout inside, which is not supported"):
        mlp_fusion.fuse(model, 16)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())


def test_layers_of_different_widths_are_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("GPTNeoXConfig")
    # Not even the model is run.
    monkeypatch.setattr("mlp_fusion.verbs.fuse.learn", None)
    text = [token_batch()]
    for options in ({"width": 16, "layers": "last:1"}, {"width": "auto", "budget": 0.5, "calibration": text}):
        with pytest.raises(InputError, match="layers of different widths are not supported for this family"):
            mlp_fusion.fuse(model, **options)
        options.pop("calibration", None)
        with pytest.raises(InputError, match="layers of different widths are not supported for this family"):
            mlp_fusion.plan(model, **options)
    assert not any(isinstance(module, FusedFFN) for module in model.modules())
