"""The benchmarks of transforms and of intrinsic dimension, on tiny problems: they run, keep what is done, and print."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import checkpoints as ck

pytestmark = [pytest.mark.usefixtures("importable"), pytest.mark.slow]


@pytest.fixture(scope="module")
def intrinsic(importable: None) -> ModuleType:
    return importlib.import_module("intrinsic")


@pytest.fixture(scope="module")
def hadamard(importable: None) -> ModuleType:
    return importlib.import_module("hadamard")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT, and data that its embeddings tell apart."""
    root = tmp_path_factory.mktemp("intrinsic")
    ck.bert_with_sst2(root)
    return root


@pytest.mark.parametrize("width", [None, "0.5"])
def test_a_scan_is_resumed_and_printed(
    width: str | None, intrinsic: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    arguments = [
        "--data", str(folder), "--model", str(folder / "bert"), "--seeds", "1", "--examples", "40", "--epochs", "1",
        "--low", "10", "--high", "100", "--per-decade", "1", "--whole", "--work", str(tmp_path / "work"), "--out",
        str(out), *(["--width", width] if width else []),
    ]  # fmt: skip
    intrinsic.main(arguments)
    rows = intrinsic.recorded(out)
    # SAID's lambdas take more than 10.
    assert [(r["way"], r["d"]) for r in rows] == [
        ("full", None), ("head", None), ("said", 100), ("did", 10), ("did", 100),
    ]  # fmt: skip
    assert "said d 10 is left out: d is 10, and each of" in capsys.readouterr().out
    assert not list((tmp_path / "work").iterdir())
    last = rows.pop()
    out.write_text(json.dumps({"rows": rows}), encoding="utf-8")
    intrinsic.main(arguments)
    again = intrinsic.recorded(out)
    assert again[:-1] == rows
    assert again[-1]["accuracy"] == last["accuracy"]
    said = capsys.readouterr().out
    intrinsic.main(["--summary", "--out", str(out)])
    assert capsys.readouterr().out in said
    assert "  did: d90 " in said


def test_d90_is_the_smallest_that_reaches_the_share_of_all_weights(
    intrinsic: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {10: (0.5, 0.7), 100: (0.8, 0.8), 1000: (0.95, 0.75), 10_000: (0.9, 0.9)}
    rows: list[dict[str, Any]] = [
        {"base": "b", "examples": 9, "way": "did", "d": d, "seed": seed, "accuracy": score, "published_gradient": False}
        for d, both in scores.items()
        for seed, score in enumerate(both)
    ]
    assert intrinsic.d90(rows, 0.9) == 1000  # a mean of 0.85, of which 0.81 are wanted
    assert intrinsic.d90(rows, 1.1) is None
    full = [{**rows[0], "way": "full", "d": None, "seed": seed, "accuracy": a} for seed, a in enumerate((0.9, 1.0))]
    intrinsic.summary([*rows, *full])
    assert "did: d90 10000 (by seed 1000, 10000)" in capsys.readouterr().out


def test_the_grid_is_even_by_logarithms(intrinsic: ModuleType) -> None:
    assert intrinsic.grid(100, 10_000, 2) == [100, 320, 1000, 3200, 10_000]
    assert intrinsic.grid(200, 900, 4) == [200, 360, 630]


def test_transforms_and_projections_are_timed(
    hadamard: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    out = tmp_path / "out.json"
    common = ["hadamard.py", "--rounds", "1", "--budget", "0", "--threads", "1", "--out", str(out)]
    monkeypatch.setattr(
        sys, "argv", [*common, "--only", "transforms", "fastfood", "--bits", "10", "13", "--sizes", "9"]
    )
    hadamard.main()
    torch.set_num_threads(threads)
    found = json.loads(out.read_text(encoding="utf-8"))
    assert [row["bits"] for row in found["transforms"]] == [10, 13]
    assert ["dense product" in row["seconds"] for row in found["transforms"]] == [True, False]
    assert found["fastfood"][0]["bytes kept"] == {"ours": 0, "published": 16 * 16}


@pytest.mark.parametrize("way", ["said", "biases"])
def test_a_step_of_each_way_is_run(way: str, hadamard: ModuleType, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    command = ["hadamard.py", "--step", way, "--d", "5000", "--batch", "1", "--layers", "1"]
    monkeypatch.setattr(sys, "argv", command)
    hadamard.main()
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["trained"] <= 5000
    assert found["held"] > 0


def test_the_published_way_computes_the_same_function(hadamard: ModuleType) -> None:
    published = importlib.import_module("published_said")
    x = torch.randn(3, 16)
    torch.testing.assert_close(published.butterflies(x), hadamard.hadamard_transform(x))
    torch.testing.assert_close(hadamard.kronecker(x[0], 3), hadamard.hadamard_transform(x[0]))
    torch.testing.assert_close(hadamard.doubling(x[0]), hadamard.hadamard_transform(x[0]))
    stored = published.Stored(12)
    theta = torch.randn(5, requires_grad=True)
    moved = stored(theta)
    assert moved.shape == (12,)
    # Published gradients are those of the projection over its length.
    (found,) = torch.autograd.grad(moved, theta, torch.ones(12))
    columns = torch.stack([stored(row) for row in torch.eye(5)])
    torch.testing.assert_close(found, columns.sum(1) / 16)


def test_the_published_way_starts_as_the_model_and_trains_d_numbers(importable: None) -> None:
    published = importlib.import_module("published_said")
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.LayerNorm(6))
    x = torch.randn(3, 4)
    before = model(x).detach()
    made = published.Published(model, 10)
    assert torch.equal(made(x), before)
    made.theta.data.normal_()
    made(x).square().sum().backward()
    assert sum(p.numel() for p in made.parameters()) == 10
    assert all(bool(p.grad.any()) for p in made.parameters())
