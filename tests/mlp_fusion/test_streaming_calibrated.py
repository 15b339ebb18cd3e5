"""Compressing from disk to disk with text to learn from: a layer in memory at a time, the bits of a model in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from discovered_models import model_of
from safetensors.torch import load_file
from streams import StoppedError, files, stop_after

import checkpoints as ck
import mlp_fusion
from mlp_fusion import InputError
from mlp_fusion.streaming import layerwise

pytestmark = pytest.mark.slow

_SENTENCES = ["the cat sat on a mat", "a dog", "the big dog ran over the cat and the mat"] * 8


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(_SENTENCES))
    return file


def with_tokenizer(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    model_of(name).to(dtype).save_pretrained(folder)
    ck.add_tokenizer(folder, pad_token="<pad>")
    return folder


_MODELS = ("Phi3Config", "OPTConfig", "Gemma3TextConfig", "EsmConfig", "Qwen3MoeConfig", "GptOssConfig")


@pytest.mark.parametrize(
    ("name", "sequential", "dtype"),
    [
        *((name, False, torch.bfloat16) for name in _MODELS),
        *((name, True, torch.float32) for name in _MODELS),
        ("Phi3Config", False, torch.float64),
        ("Qwen3MoeConfig", True, torch.float64),
    ],
)
def test_calibrated_the_same_bits_as_in_memory(
    name: str, sequential: bool, dtype: torch.dtype, tmp_path: Path, text: Path
) -> None:
    source = with_tokenizer(name, tmp_path / "source", dtype)
    reports = [
        mlp_fusion.compress(
            source, tmp_path / str(stream), 0.5, stream=stream, calibration=text, sequential=sequential
        )
        for stream in (False, True)
    ]  # fmt: skip
    memory, streamed = ck.tensors(tmp_path / "False"), ck.tensors(tmp_path / "True")
    assert memory.keys() == streamed.keys()
    assert all(torch.equal(memory[key], streamed[key]) for key in memory)
    scales = [load_file(tmp_path / folder / ck.SCALE) for folder in ("False", "True")]
    assert all(torch.equal(scales[0][key], scales[1][key]) for key in scales[0])
    for ours, theirs in zip(reports[1].rows, reports[0].rows, strict=True):
        assert (ours.path, ours.held_out_error, ours.ridge) == (theirs.path, theirs.held_out_error, theirs.ridge)
        assert 0 < ours.output_error < 1.5
    assert reports[1].calibration is not None
    assert reports[0].calibration is not None
    assert reports[1].calibration.tokens == reports[0].calibration.tokens


@pytest.mark.parametrize("sequential", [False, True])
def test_a_calibrated_run_goes_on(
    sequential: bool, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = with_tokenizer("Qwen3MoeConfig", tmp_path / "source")
    options: dict[str, Any] = {"stream": True, "calibration": text, "sequential": sequential}
    mlp_fusion.compress(source, tmp_path / "whole", 0.5, **options)
    with pytest.raises(StoppedError):
        mlp_fusion.compress(source, tmp_path / "out", 0.5, progress=stop_after(1), **options)
    # Other text, other hidden states.
    text.write_text("\n".join(_SENTENCES[:3]))
    with pytest.raises(InputError, match="the unfinished run had another text"):
        mlp_fusion.compress(source, tmp_path / "out", 0.5, resume=True, **options)
    text.write_text("\n".join(_SENTENCES))
    with pytest.raises(StoppedError):
        # A journal that is ahead of the hidden states: the layer is done again.
        mlp_fusion.compress(source, tmp_path / "out", 0.5, resume=True, progress=stop_after(1), **options)
    mlp_fusion.compress(source, tmp_path / "out", 0.5, resume=True, **options)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source", "text.txt", "whole"]


def test_only_one_layer_is_in_memory(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = with_tokenizer("Qwen3MoeConfig", tmp_path / "source")
    seen: list[int] = []
    loaded = layerwise.LayerwiseModel.loaded

    @contextlib.contextmanager
    def watched(self: Any, layer: Any) -> Iterator[None]:
        with loaded(self, layer):
            real = {
                name.split(".")[2] for name, p in self.model.named_parameters() if ".layers." in name and not p.is_meta
            }
            seen.append(len(real))
            yield

    monkeypatch.setattr(layerwise.LayerwiseModel, "loaded", watched)
    mlp_fusion.compress(source, tmp_path / "out", 0.5, stream=True, calibration=text)
    assert seen == [1, 1]


def test_models_whose_layers_do_not_feed_one_another(tmp_path: Path, text: Path) -> None:
    source = with_tokenizer("T5Config", tmp_path / "source")
    with pytest.raises(InputError, match="its layers do not feed one another from the first to the last"):
        mlp_fusion.compress(source, tmp_path / "out", 0.5, stream=True, calibration=text)
    bare = ck.copy(source, tmp_path / "bare")
    for file in bare.glob("*token*"):
        file.unlink()
    with pytest.raises(InputError, match="has no tokenizer to read"):
        mlp_fusion.compress(bare, tmp_path / "other", 0.5, stream=True, calibration=text)
