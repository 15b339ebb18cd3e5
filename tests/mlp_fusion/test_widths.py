"""Widths in configs and in the models that are built from them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from discovered_models import model_of
from torch import nn

from families import tiny_model
from mlp_fusion import InputError, fuse
from mlp_fusion.families import building
from mlp_fusion.store.record import architecture_of, fused_config
from mlp_fusion.store.widths import described

_PART = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}


def meta(config: Any) -> Any:
    return building.build(building.model_class(config), config)


def stated(config: Any, shares: list[float]) -> Any:
    """The config of a model whose FFNs keep shares of their neurons; and what is built from it has them."""
    model, architecture = meta(config), architecture_of(config)
    sites = architecture.sites(model)
    assert len(sites) == len(shares)
    widths = [int(site.kind.width * share) for site, share in zip(sites, shares, strict=True)]
    before = config.to_dict()
    changed = fused_config(model, architecture, sites, widths, method="fusion", parameterization="folded")
    assert config.to_dict() == before
    built = meta(changed)
    assert [site.neurons for site in architecture.sites(built)] == widths
    return changed


def test_a_number_says_the_width() -> None:
    changed = stated(tiny_model("llama").config, [0.25] * 3)
    assert changed.intermediate_size == 16
    assert "widths" not in changed.mlp_fusion
    assert changed.mlp_fusion["fused_layers"] == [0, 1, 2]


def test_a_key_that_says_nothing_is_set() -> None:
    config = tiny_model("gpt2").config
    assert config.n_inner is None
    changed = stated(config, [0.5] * 3)
    assert changed.n_inner == 32
    assert "widths" not in changed.mlp_fusion


def test_a_ratio_is_multiplied() -> None:
    config = transformers.SwinConfig(**_SWIN)
    assert config.mlp_ratio == 4.0
    changed = stated(config, [0.5] * 2)
    assert changed.mlp_ratio == 2.0
    assert "widths" not in changed.mlp_fusion
    # One share of all, or the record says it.
    uneven = stated(config, [0.5, 1.0])
    assert uneven.mlp_ratio == 4.0
    assert list(uneven.mlp_fusion["widths"].values()) == [16]


def test_parts_of_a_composite_model_have_keys_of_their_own() -> None:
    text = {**_PART, "vocab_size": 40, "intermediate_size": 96, "bos_token_id": 0, "eos_token_id": 2}
    vision = {**_PART, "intermediate_size": 128, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision)
    both = stated(config, [0.5] * 4)
    assert (both.text_config.intermediate_size, both.vision_config.intermediate_size) == (48, 64)
    assert "widths" not in both.mlp_fusion
    order = ["text" in site.path for site in architecture_of(config).sites(meta(config))]
    one = stated(config, [0.5 if text else 1.0 for text in order])
    assert (one.text_config.intermediate_size, one.vision_config.intermediate_size) == (48, 128)
    assert "widths" not in one.mlp_fusion
    mixed = stated(config, [0.5, 1.0, 0.5, 0.5] if order[0] else [0.5, 0.5, 0.5, 1.0])
    assert (mixed.text_config.intermediate_size, mixed.vision_config.intermediate_size) == (96, 64)
    assert len(mixed.mlp_fusion["widths"]) == 1


def test_what_no_key_states_is_in_the_record_and_drawn_anew() -> None:
    """Models built from such a config are narrow, whatever class they are built with, and train from scratch."""
    changed = stated(model_of("BloomConfig").config, [0.5, 0.25])
    assert changed.mlp_fusion["widths"] == {"h.0.mlp": 64, "h.1.mlp": 32}
    for cls in (transformers.AutoModel, transformers.AutoModelForCausalLM):
        model: Any = cls.from_config(copy.deepcopy(changed))
        base = model.base_model
        assert [block.mlp.dense_h_to_4h.out_features for block in base.h] == [64, 32]
        assert [block.mlp.dense_4h_to_h.in_features for block in base.h] == [64, 32]
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        assert model(input_ids=torch.tensor([[5, 6, 7]]))[0].isfinite().all()


def test_records_that_cannot_be_followed_are_refused() -> None:
    model = model_of("BloomConfig")
    fuse(model, 16)
    record = model.config.mlp_fusion
    config = copy.deepcopy(model.config)
    for widths, message in (
        ({"h.0.mlp": 4096}, "has 128 neurons, the record of its fusion says 4096: it is damaged"),
        ({"h.0.mlp": "16"}, "its widths are"),
        ({"h.0.mlp": True}, "its widths are"),
        ([16], "its widths are"),
    ):
        config.mlp_fusion = {**record, "widths": widths}
        with pytest.raises(InputError, match=message):
            transformers.AutoModel.from_config(config)


def test_the_described_part_of_a_model() -> None:
    model = tiny_model("bert")
    path, part, built = described(model)
    assert (path, part, type(built)) == ("", model, type(model))
    assert all(p.is_meta for p in built.parameters())
    wrapper = nn.Module()
    wrapper.inner, wrapper.config = model, model.config  # type: ignore[assignment]
    assert described(wrapper)[:2] == ("inner", model)
    for bare in (nn.Module(), nn.Sequential(nn.Linear(2, 2))):
        bare.config = model.config  # type: ignore[assignment]
        with pytest.raises(InputError, match=r"no model can be built from its config \(there is no Hugging Face model"):
            described(bare)
