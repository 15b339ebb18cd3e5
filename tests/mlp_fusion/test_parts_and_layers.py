"""Models of several parts and stacks: which layers FFNs lie in, parts fused by themselves, two dtypes in one FFN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from many_inputs import processed
from many_inputs import tiny as tiny_input
from tiny_configs import TINY
from transformers import CONFIG_MAPPING, AutoModel, CLIPVisionModel

from mlp_fusion import InputError, fuse
from mlp_fusion.families import building
from mlp_fusion.finetuning.loading import _layers_of
from mlp_fusion.store.record import architecture_of


def built(model_type: str) -> Any:
    config = CONFIG_MAPPING[model_type](**TINY[model_type])
    return building.build(building.model_class(config), config)


def test_layers_of_ffns_by_their_numbers() -> None:
    assert _layers_of(built("bert"), [1]) == [1]
    # A layer with routed and shared experts has two, a dense one has one.
    model = built("deepseek_v3")
    numbers = {site.path: site.index for site in architecture_of(model.config).sites(model)}
    chosen = [number for path, number in numbers.items() if path.startswith("layers.1.")]
    assert len(chosen) == 2
    assert _layers_of(model, chosen) == [1]
    assert _layers_of(model, list(numbers.values())) == [0, 1]
    with pytest.raises(InputError, match="several stacks of layers: leave out the original"):
        _layers_of(built("t5"), [0, 2])
    assert _layers_of(built("t5"), [3]) == [1]


def test_a_part_that_is_fused_by_itself_is_saved_by_itself(tmp_path: Path) -> None:
    model = tiny_input("clip")
    fuse(model.vision_model, 24)
    with pytest.raises(InputError, match=r"CLIPVisionModel, a part of the model, was fused by itself: fuse the whole"):
        model.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole" / "config.json").exists()
    model.vision_model.save_pretrained(tmp_path / "part")
    pixels = {"pixel_values": processed("clip")["pixel_values"]}
    loaded = CLIPVisionModel.from_pretrained(tmp_path / "part")
    torch.testing.assert_close(loaded(**pixels)[0], model.vision_model(**pixels)[0], rtol=1e-4, atol=1e-4)


def test_an_ffn_with_an_output_projection_in_another_dtype(tmp_path: Path) -> None:
    tiny_input("t5").save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, dtype=torch.float16)
    kept = {p.dtype for name, p in model.named_parameters() if name.endswith(".wo.weight")}
    assert kept == {torch.float32}
    report = fuse(model, 0.5)
    assert {row.neurons_after for row in report.rows} == {48}
    assert {p.dtype for name, p in model.named_parameters() if name.endswith(".wo.weight")} == kept
