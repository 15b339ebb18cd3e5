"""The benchmark of squeezing, on a tiny model: equal parameters are equal, and every row runs once."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

import checkpoints as ck

pytestmark = [pytest.mark.usefixtures("importable"), pytest.mark.slow]


@pytest.fixture(scope="module")
def squeezing(importable: None) -> ModuleType:
    return importlib.import_module("squeezing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT and data."""
    root = tmp_path_factory.mktemp("squeezing")
    ck.bert_with_sst2(root)
    return root


def test_rows_run_once(squeezing: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--data", str(folder), "--model", str(folder / "bert"), "--shares", "0.95", "0.9",
        "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json"),
    ]  # fmt: skip
    for _ in range(2):
        squeezing.main(arguments)
    rows = squeezing.recorded(tmp_path / "out.json")
    assert [row["row"] for row in rows] == list(squeezing.ROWS)
    whole = rows[0]["points"][0]["parameters"]
    for row in rows[1:]:
        assert row["points"][-1]["parameters"] <= 0.9 * whole, row["row"]
        assert row["points"][-1]["parameters"] > 0.8 * whole, row["row"]
        assert all(0.0 <= point["accuracy"] <= 1.0 for point in row["points"])
    squeezing.main(["--summary", "--out", str(tmp_path / "out.json")])
    assert "svd" in capsys.readouterr().out.splitlines()[-1]


def test_all_singular_values_are_the_model(squeezing: ModuleType) -> None:
    model = ck.tiny_model("bert", task="Model", vocab_size=1200).eval()
    ids = torch.tensor([[1, 2, 3]])
    wanted = model(ids).last_hidden_state
    # Two factors of every matrix, all singular values in them: more parameters than any bound.
    sizes = squeezing.factorised(model, 10**9).num_parameters()
    torch.testing.assert_close(model(ids).last_hidden_state, wanted)
    fewer = squeezing.factorised(ck.tiny_model("bert", task="Model", vocab_size=1200), int(0.8 * sizes))
    assert 0.75 * sizes < fewer.num_parameters() <= 0.8 * sizes


def test_a_width_that_fits(squeezing: ModuleType) -> None:
    model = ck.tiny_model("bert", task="Model", vocab_size=1200)
    count = int(0.95 * model.num_parameters())
    width = squeezing.fitting_width(model, count)
    assert width % 8 == 0
    model.config.intermediate_size = width
    assert type(model)(model.config).num_parameters() <= count
    assert squeezing.fitting_width(model, 10) is None
