"""Families without an entry: found, proved, fused, saved, reloaded and restored."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import checkpoints as ck
import mlp_fusion
from families import token_batch
from mlp_fusion import InputError
from mlp_fusion.families import ARCHITECTURES
from mlp_fusion.families.discovered import DiscoveredArchitecture, discovered
from mlp_fusion.modules import FusedFFN
from mlp_fusion.store.record import architecture_of, fusion_record, known_architecture

pytestmark = pytest.mark.slow

_SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 40, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
#: Config class -> its arguments: gated and plain, with biases and without, widths with a key of another name.
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
}  # fmt: skip


def model_of(name: str, **changes: Any) -> Any:
    config = getattr(transformers, name)(**{**MODELS[name], **changes})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


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
    exact = logits(model)
    planned = mlp_fusion.plan(model, 16)
    report = mlp_fusion.fuse(model, 16, optimizer="adamw")
    assert len(report.rows) == 2
    torch.testing.assert_close(logits(model), exact, rtol=1e-4, atol=1e-5)
    assert planned.parameters_after == sum(p.numel() for p in model.parameters())

    loss = model(**token_batch(), labels=token_batch()["input_ids"]).loss
    loss.backward()
    assert all(ffn.projection("w_in").weight.grad is not None for ffn in model.modules() if isinstance(ffn, FusedFFN))  # type: ignore[union-attr]

    model.save_pretrained(tmp_path)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(loaded), exact, rtol=1e-4, atol=1e-5)
    mlp_fusion.restore(loaded, tmp_path)
    assert sum(isinstance(module, FusedFFN) and module.scale is not None for module in loaded.modules()) == 2
    torch.testing.assert_close(logits(loaded), exact, rtol=1e-4, atol=1e-5)


def test_compress_and_verify(tmp_path: Path) -> None:
    tied("SmolLM3Config").save_pretrained(tmp_path / "source")
    ck.add_tokenizer(tmp_path / "source", pad_token="<pad>")
    mlp_fusion.compress(tmp_path / "source", tmp_path / "out", 16, optimizer="sgd")
    assert mlp_fusion.verify(tmp_path / "out").passed
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(tied("SmolLM3Config")), rtol=1e-4, atol=1e-5)


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
    for wrong in (None, 3, {}, {**record["ffn"], "projections": {"w_in": "a"}}, {**record["ffn"], "function": "magic"}):
        damaged = copy.deepcopy(loaded.config)
        damaged.mlp_fusion = {**record, "ffn": wrong}
        with pytest.raises(InputError, match="does not say where the FFNs are"):
            known_architecture(damaged)


def test_an_entry_survives_json() -> None:
    config = model_of("GPTJConfig").config
    entry = discovered(config)
    again = DiscoveredArchitecture.of_record("gptj", json.loads(json.dumps(entry.kept())))
    assert again.kept() == entry.kept()
    assert (entry.width(config), entry.width_key, entry.function) == (128, "n_inner", "gelu_tanh")
    assert architecture_of(config) is entry  # found once


REFUSED = {
    "OPTConfig": ({"ffn_dim": 64, "word_embed_proj_dim": 32}, "without a module of their own"),
    "Phi3Config": ({}, "hold gate and up in one projection"),
    "T5Config": ({}, "its FFNs are of 2 kinds"),
    "AlbertConfig": ({"embedding_size": 32}, "do not lie in one stack of layers|without a module of their own"),
    "BloomConfig": ({}, "have no width that the config can state"),
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


def test_layers_of_different_widths_are_refused_before_anything_changes() -> None:
    model = model_of("GPTNeoXConfig")
    with pytest.raises(InputError, match="layers of different widths are not supported for this family"):
        mlp_fusion.fuse(model, 16, layers="last:1")
    assert not any(isinstance(module, FusedFFN) for module in model.modules())
