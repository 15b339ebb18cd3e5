"""Models that take images besides text: what text alone reaches of them is calibrated on text, and the rest is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from streams import files

import checkpoints as ck
import mlp_fusion
from mlp_fusion import InputError
from mlp_fusion.reducing.chosen import find_ffns
from mlp_fusion.running.drawing import random_text, text_refusal
from mlp_fusion.running.synthetic import RANDOM_INPUTS, WRITTEN, synthetic_kind
from mlp_fusion.streaming.layerwise import LayerwiseModel

TOWER = "language_model.*"
TOKENS = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}


@pytest.fixture
def model() -> Any:
    """Qwen2-VL's shape, with its head."""
    text = transformers.Qwen2VLTextConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    )  # fmt: skip
    sight = {"depth": 2, "embed_dim": 32, "num_heads": 4, "hidden_size": 32, "patch_size": 4, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(text_config=text.to_dict(), vision_config=sight, **TOKENS)
    torch.manual_seed(0)
    model: Any = transformers.Qwen2VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
    return model.eval()


@pytest.fixture
def source(model: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "source")
    return ck.add_tokenizer(tmp_path / "source", pad_token="<pad>")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "over", "big"]
    drawn = torch.randint(len(words), (60, 12), generator=torch.Generator().manual_seed(0)).tolist()
    file = tmp_path / "text.txt"
    file.write_text("\n".join(" ".join(words[n] for n in line) for line in drawn))
    return file


def test_text_reaches_its_own_tower(model: Any) -> None:
    architecture, sites = find_ffns(model)
    reads = [site for site in sites if "language_model" in site.path]
    assert 0 < len(reads) < len(sites)
    assert text_refusal(model, architecture, reads) is None
    assert "visual.blocks.0.mlp: this FFN did not run" in str(text_refusal(model, architecture, sites))
    assert synthetic_kind(model, text_refusal(model, architecture, reads)) == WRITTEN
    assert synthetic_kind(model, text_refusal(model, architecture, sites)) == RANDOM_INPUTS


def test_it_is_calibrated_on_text_in_memory_and_streamed(source: Path, text: Path, tmp_path: Path) -> None:
    for stream in (False, True):
        report = mlp_fusion.compress(source, tmp_path / f"out{stream}", 0.5, TOWER, calibration=text, stream=stream)
        assert report.settings.method == "merge"
        assert report.calibration is not None
        assert [row.path.split(".")[-4] for row in report.rows] == ["language_model"] * 2
    memory, streamed = (files(tmp_path / f"out{stream}") for stream in (False, True))
    assert memory["model.safetensors"] == streamed["model.safetensors"]
    wide, narrow = ck.tensors(source), ck.tensors(tmp_path / "outTrue")
    assert all(torch.equal(narrow[name], value) for name, value in wide.items() if ".visual." in name)
    assert mlp_fusion.verify(tmp_path / "outFalse").passed
    assert transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "outTrue").num_parameters() > 0


@pytest.mark.slow
def test_its_widths_are_found_streamed(source: Path, text: Path, tmp_path: Path) -> None:
    report = mlp_fusion.compress(source, tmp_path / "out", "auto", TOWER, budget=0.5, calibration=text, stream=True)
    assert sum(row.neurons_after for row in report.rows) <= 64


def test_ffns_that_text_does_not_reach_are_named(source: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"text alone does not run the FFNs .*\(model\.visual\.blocks\.0\.mlp: .*\): choose"
    ):
        mlp_fusion.compress(source, tmp_path / "out", 0.5, calibration=text)
    with pytest.raises(InputError, match=r"visual\.blocks\.0\.mlp does not run on text: leave it out \(layers\)"):
        mlp_fusion.compress(source, tmp_path / "out", 0.5, calibration=text, stream=True)
    assert not (tmp_path / "out").exists()


def test_it_writes_the_text_that_its_tower_is_calibrated_on(model: Any) -> None:
    report = mlp_fusion.fuse(model, 0.5, TOWER, synthetic=512)
    assert report.calibration.synthetic == WRITTEN


def test_where_images_cannot_be_guessed_text_serves_its_own_tower(
    model: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unfit(*_given: Any, **_named: Any) -> Any:
        raise ValueError("images of another size")

    monkeypatch.setattr(transformers.Qwen2VLModel, "get_image_features", unfit)
    monkeypatch.setattr(transformers.Qwen2VLForConditionalGeneration, "get_image_features", unfit)
    guess = "what it takes besides input_ids cannot be guessed: give sample"
    for call in (
        lambda: mlp_fusion.fuse(model, 0.5),
        lambda: mlp_fusion.compress(source, tmp_path / "out", 0.5),
        lambda: mlp_fusion.fuse(model, 0.5, synthetic=64),
    ):
        with pytest.raises(InputError, match=f"{guess}|takes nothing that can be drawn: pass calibration"):
            call()
    ids = random_text(model, seed=0)["input_ids"]
    assert ids.shape == (8, 64)
    assert not torch.isin(ids, torch.tensor(list(TOKENS.values()))).any()
    mlp_fusion.compress(source, tmp_path / "out", 0.5, TOWER)
    assert mlp_fusion.verify(tmp_path / "out").passed
    assert mlp_fusion.fuse(model, 0.5, TOWER).sample == "random token ids"


def test_nothing_is_left_of_looking_what_runs(source: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(source)
    hollow = LayerwiseModel(source, config, torch.float32, torch.device("cpu"))
    _, sites = find_ffns(transformers.AutoModelForImageTextToText.from_pretrained(source))
    before = torch.get_rng_state()
    (stack,) = hollow.stacks(sites, {"input_ids": torch.full((1, 5), 9)}, [len(sites) - 1])
    assert [layer.path.split(".")[-3:-1] for layer in stack] == [["language_model", "layers"]] * 2
    assert not any("forward" in vars(module) or module.training for module in hollow.model.modules())
    assert torch.equal(torch.get_rng_state(), before)
    # Of the layers none is in memory, be they for text or for images.
    idle = [name for name, p in hollow.model.named_parameters() if (".blocks." in name or ".layers." in name)]
    assert len(idle) > 20
    assert all(hollow.model.get_parameter(name).is_meta for name in idle)
