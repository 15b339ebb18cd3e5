"""The benchmark of MiniALBERT, on a tiny teacher: each kind of row runs, is written down once, and is printed."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

import checkpoints as ck
import mlp_fusion

pytestmark = [pytest.mark.usefixtures("importable"), pytest.mark.slow]


@pytest.fixture(scope="module")
def minialbert(importable: None) -> ModuleType:
    return importlib.import_module("minialbert")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT without a head for masked tokens, and data."""
    root = tmp_path_factory.mktemp("minialbert")
    ck.bert_with_sst2(root, max_position_embeddings=64)
    (root / "tiny_shakespeare.txt").write_text("the cat\nsat a the\n\nthe the cat\n" * 300, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    "row", ["minilm teacher 4", "minilm random bare 4", "small teacher 4", "minilm fusion", "small itself"]
)
def test_a_row_runs_once(row: str, minialbert: ModuleType, folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setattr(minialbert, "SMALL", {**minialbert.SMALL, "hidden_size": 32, "intermediate_size": 32})
    monkeypatch.setattr(minialbert, "LENGTH", 16)
    monkeypatch.setattr(minialbert, "BATCH", 4)
    arguments = [
        "--rows", row, "--steps", "4", "--data", str(folder), "--model", str(folder / "bert"), "--examples", "40",
        "--teacher-steps", "2", "--embedding-size", "8", "--width", "0.5", "--work", str(tmp_path / "work"),
        "--out", str(tmp_path / "out.json"),
    ]  # fmt: skip
    for _ in range(2):
        minialbert.main(arguments)
    (found,) = minialbert.recorded(tmp_path / "out.json")
    assert 0.0 <= found["accuracy"] <= 1.0
    assert ("mlm" in found) == ("fusion" not in row)
    if "curve" in found:
        assert [point["step"] for point in found["curve"]] == [0, 1, 2, 3, 4]
        assert found["options"]["start"] in row
        assert ("adapter_size" in found["options"]) == ("bare" in row)
        assert ("output_weight" in found["options"]) == ("minilm" in row)
        assert found["mlm"] > 0
    minialbert.main(["--summary", "--out", str(tmp_path / "out.json")])
    assert row in capsys.readouterr().out.splitlines()[-1]


def test_the_fused_pass_computes_the_same(minialbert: ModuleType) -> None:
    shape = {"vocab_size": 9, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "adapter_size": 2}
    layer = mlp_fusion.MiniAlbertModel(mlp_fusion.MiniAlbertConfig(**shape)).encoder.layers[0]
    states = torch.randn(2, 5, 32)
    torch.testing.assert_close(minialbert.fused_chunk(layer)(states), layer.ff_chunk(states))
