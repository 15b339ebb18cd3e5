"""Checkpoints, and the command line, that the tests of several modules share.

A module that needs other checkpoints defines its own by these names.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import checkpoints as ck
import mlp_fusion
from commands import Outcome, Run
from families import FAMILIES
from mlp_fusion import cli as cli_module


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run `mlp-fusion` with the given arguments in this process."""

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["mlp-fusion", *map(str, arguments)])
        capfd.readouterr()
        try:
            cli_module.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        else:
            code = 0
        return Outcome(code, *capfd.readouterr())

    return call


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT classifier without a tokenizer, and with files beside it."""
    folder = ck.save_tiny(tmp_path_factory.mktemp("source") / "bert")
    # Old files state keys that a newer transformers would drop or rename on saving.
    ck.edit_config(folder, position_embedding_type="absolute", gradient_checkpointing=False, of_mine=[1, {"a": 2}])
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (folder / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}]')
    (folder / "merges.txt").write_bytes(b"\xc3\xa4 \xff\n")
    (folder / "chat_template.jinja").write_text("{{ x }}")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "etags.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "README.md").write_text("the original's card")
    return folder


@pytest.fixture(scope="module")
def fused(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source`, compressed to one width."""
    out = tmp_path_factory.mktemp("fused") / "bert-fused"
    mlp_fusion.compress(source, out, 16, device="cpu")
    return out


@pytest.fixture(scope="module")
def uneven(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source` with the last layer alone compressed."""
    out = tmp_path_factory.mktemp("uneven") / "bert-uneven"
    mlp_fusion.compress(source, out, 16, "last:1", device="cpu")
    return out


@pytest.fixture
def broken(fused: Path, tmp_path: Path) -> Path:
    """A fused checkpoint that the test may damage."""
    return ck.copy(fused, tmp_path / "broken")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a classifier of every family."""
    root = tmp_path_factory.mktemp("saved")
    for family in FAMILIES:
        ck.save_tiny(root / family, family)
    return root


@pytest.fixture
def bert(saved: Path, tmp_path: Path) -> Path:
    """A BERT checkpoint that the test may change."""
    return ck.copy(saved / "bert", tmp_path / "bert")
