"""`compress` writes all of it or nothing, and refuses what it cannot do before it begins."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

import checkpoints as ck
import mlp_fusion
from checkpoints import B_IN, W_IN, W_OUT
from mlp_fusion import InputError
from mlp_fusion.verbs import compress as compress_module

# --- where it is written ---------------------------------------------------------------------------------------------


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def compress_refused(source: Path, out: Path, width: Any = 16, **options: Any) -> str:
    """The message of the refusal, which must be one line and leave everything as it was."""
    before = tree(out.parent) if out.parent.is_dir() else None
    with pytest.raises(InputError) as caught:
        mlp_fusion.compress(source, out, width, **options)
    assert (tree(out.parent) if out.parent.is_dir() else None) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folder_with_something_in_it(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".hidden").write_text("mine")
    assert compress_refused(source, out) == (
        f"{out} exists and is not empty: choose another folder, empty it, or force (--force) if mlp-fusion wrote it"
    )


def test_output_that_is_a_file(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    assert compress_refused(source, out) == f"{out} is a file: choose another folder"
    assert out.read_text() == "mine"


def test_output_over_the_source(source: Path) -> None:
    assert "is not empty" in compress_refused(source, source)


def test_output_below_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    compress_refused(source, tmp_path / "file" / "out")


@pytest.mark.parametrize("name", ["empty", "new", "a/b c/ü", "with.dots.v1"])
def test_folders_that_will_do(name: str, source: Path, fused: Path, tmp_path: Path) -> None:
    if name == "empty":
        (tmp_path / name).mkdir()
    mlp_fusion.compress(source, tmp_path / name, 16)
    assert tree(tmp_path / name) == tree(fused)
    assert not list(tmp_path.rglob("*.partial"))
    assert (tmp_path / name / ck.WEIGHTS).read_bytes() == (fused / ck.WEIGHTS).read_bytes()


def test_output_is_relative_to_the_working_directory(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mlp_fusion.compress(str(source), "out", 16, "0")
    assert (tmp_path / "out" / ck.WEIGHTS).is_file()
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "exists"),
    [(RuntimeError, False), (KeyboardInterrupt, False), (KeyboardInterrupt, True), (SystemExit, False)],
)
@pytest.mark.parametrize("step", ["fuse", "write_config", "save_file", "_write_card"])
def test_nothing_is_left_after_a_failure(
    step: str, error: type[BaseException], exists: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    before = tree(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise error("in the middle")

    monkeypatch.setattr(compress_module, step, fail)
    with pytest.raises(error, match="in the middle"):
        mlp_fusion.compress(source, out, 16)
    assert tree(tmp_path) == before


def test_no_parent_is_left_after_a_failure(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compress_module, "_write_card", None)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        mlp_fusion.compress(source, tmp_path / "a" / "b" / "out", 16)
    assert tree(tmp_path) == []


def test_a_folder_filled_in_the_meantime_is_left_alone(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def interfere(*_: Any) -> None:
        out.mkdir()
        (out / "theirs").write_text("kept")

    monkeypatch.setattr(compress_module, "_write_card", interfere)
    with pytest.raises(InputError, match="out exists and is not empty"):
        mlp_fusion.compress(source, out, 16)
    assert tree(tmp_path) == ["out", "out/theirs"]


# --- refusals of compress --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rest", [W_IN, B_IN, W_OUT])
def test_weights_that_are_not_finite(value: float, rest: str, source: Path, tmp_path: Path) -> None:
    def damage(tensor: Tensor) -> Tensor:
        tensor.flatten()[-1] = value
        return tensor

    folder = ck.replace_tensor(ck.copy(source, tmp_path / "source"), f"bert.encoder.layer.1.{rest}", damage)
    message = compress_refused(folder, tmp_path / "out")
    assert "bert.encoder.layer.1" in message
    assert "NaN or Inf" in message


@pytest.mark.parametrize(
    "name", ["bert.encoder.layer.1.intermediate.dense.weight", "classifier.weight", "bert.pooler.dense.bias"]
)
def test_other_weights_that_are_not_finite(name: str, source: Path, tmp_path: Path) -> None:
    folder = ck.replace_tensor(
        ck.copy(source, tmp_path / "source"), name, lambda tensor: torch.full_like(tensor, float("nan"))
    )  # fmt: skip
    assert "NaN or Inf" in compress_refused(folder, tmp_path / "out", layers="0")


def test_file_cut_short(source: Path, tmp_path: Path) -> None:
    folder = ck.copy(source, tmp_path / "source")
    (folder / ck.WEIGHTS).write_bytes((folder / ck.WEIGHTS).read_bytes()[:-100])
    assert f"{folder / ck.WEIGHTS}: damaged or cut short" in compress_refused(folder, tmp_path / "out")


def test_shapes_that_disagree_with_the_config(source: Path, tmp_path: Path) -> None:
    folder = ck.edit_config(ck.copy(source, tmp_path / "source"), intermediate_size=48)
    message = compress_refused(folder, tmp_path / "out")
    assert message.startswith(f"{folder}: ")
    assert "config.json" in message
    assert "48" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe\x00", "cannot be read as UTF-8 text"),
        (b"", "no text in it"),
        (b"\n \t\n", "no text in it"),
        (b"\xef\xbb\xbf\n", "no text in it"),
    ],
)
def test_text_without_text(content: bytes, words: str, source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    assert compress_refused(source, tmp_path / "out", text=text).startswith(f"{text}: {words}")


def test_text_that_is_not_there(source: Path, tmp_path: Path) -> None:
    absent = tmp_path / "absent.txt"
    assert compress_refused(source, tmp_path / "out", text=absent) == f"{absent}: no such file"
    assert compress_refused(source, tmp_path / "out", text=tmp_path) == f"{tmp_path} is a folder: name a file of texts"


@pytest.mark.parametrize("device", ["tpu", "meta", "gpu", "cuda:99", "cuda:x", "", "cpu,cuda"])
def test_devices_refused(device: str, source: Path, tmp_path: Path) -> None:
    assert compress_refused(source, tmp_path / "out", device=device).startswith(f"device '{device}': ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "magic"}, "unknown method 'magic': use one of"),
        ({"optimizer": "magic"}, "unknown optimizer 'magic': use one of"),
        ({"layers": "7"}, "layers 7 out of range"),
        ({"width": 0}, "must be positive"),
        ({"width": 1.0}, "strictly between 0 and 1"),
    ],
)
def test_options_refused(options: dict[str, Any], words: str, source: Path, tmp_path: Path) -> None:
    assert words in compress_refused(source, tmp_path / "out", **options)


def test_options_are_checked_before_anything_is_loaded(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress_module, "_load", None)
    for options in ({"width": 7}, {"layers": "9"}, {"optimizer": "x"}, {"device": "x"}, {"text": tmp_path / "x"}):
        compress_refused(source, tmp_path / "out", **options)
    compress_refused(tmp_path / "nowhere" / "at" / "all", tmp_path / "out")
    compress_refused(source, source)


def test_fused_already(fused: Path, tmp_path: Path) -> None:
    assert compress_refused(fused, tmp_path / "out", 8).startswith("the model is fused already")


def test_pickles(source: Path, tmp_path: Path) -> None:
    folder = ck.copy(source, tmp_path / "source")
    (folder / ck.WEIGHTS).unlink()
    assert "a pickle can run any code" in compress_refused(folder, tmp_path / "out")


def test_damaged_tokenizer(source: Path, tmp_path: Path) -> None:
    folder = ck.copy(source, tmp_path / "source")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="tokenizer"):
        mlp_fusion.compress(folder, tmp_path / "out", 16)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_is_said_to_be_one(
    error: Exception, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: Any, **_options: Any) -> None:
        raise error

    monkeypatch.setattr(compress_module, "write_weights", refuse)
    message = compress_refused(source, tmp_path / "out")
    assert message.startswith(str(tmp_path))
    assert message.endswith("No space left on device: once that is mended, start again")
