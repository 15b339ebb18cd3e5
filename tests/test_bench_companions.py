"""The benchmark of companions, on a tiny model: each kind of row runs, is written down once, and is printed."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

import checkpoints as ck
from mlp_fusion.choices import PEFT_METHODS

pytestmark = [pytest.mark.usefixtures("importable"), pytest.mark.slow]


@pytest.fixture(scope="module")
def companions(importable: None) -> ModuleType:
    return importlib.import_module("companions")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with biases, and data."""
    root = tmp_path_factory.mktemp("companions")
    model = ck.bert_with_sst2(root)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0.0, 0.02)
    model.save_pretrained(root / "bert")
    return root


@pytest.mark.parametrize(
    "rows", ["step pafi matrix", "step peanut", "step bitfit", "quarter hiwi weight", "quarter lora"]
)
def test_a_row_runs_once(rows: str, companions: ModuleType, folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    arguments = [
        "--rows", rows, "--data", str(folder), "--model", str(folder / "bert"), "--seeds", "1", "--examples", "40",
        "--epochs", "1", "--steps", "1", "--width", "0.5", "--work", str(tmp_path / "work"),
        "--out", str(tmp_path / "out.json"),
    ]  # fmt: skip
    for _ in range(2):
        companions.main(arguments)
    (row,) = companions.recorded(tmp_path / "out.json")
    assert row["trained"] > 0
    assert row["stored"] > 0
    assert row["seconds_per_step"] > 0
    assert ("stored_merged" in row) == ("hiwi" in rows)
    companions.main(["--summary", "--out", str(tmp_path / "out.json")])
    assert rows in capsys.readouterr().out.splitlines()[-1]


def test_rows_are_of_methods_that_there_are_or_will_be(companions: ModuleType) -> None:
    names = {method.peft for method in companions.METHODS.values()} - {None}
    assert names <= {*PEFT_METHODS, "said"}
    assert len(companions.all_rows()) == len(set(companions.all_rows()))
