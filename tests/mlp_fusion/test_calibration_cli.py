"""Calibration text on the command line and in `compress`: what is passed on, what is written, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import checkpoints as ck
import mlp_fusion
from families import WIDTH
from mlp_fusion import InputError
from mlp_fusion.cli import cli

pytestmark = pytest.mark.slow

WORDS = ("the", "a", "cat", "sat")
SENTENCES = [f"{a} {b} {c} cat" for a in WORDS for b in WORDS for c in WORDS]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a tokenizer that knows the words of `SENTENCES`."""
    return ck.add_tokenizer(ck.save_tiny(tmp_path_factory.mktemp("source") / "bert"), pad_token="<pad>")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "train.tsv"
    file.write_text("".join(f"{sentence}\t1\n" for sentence in SENTENCES), encoding="utf-8")
    return file


def _run(*arguments: object) -> Any:
    result = CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_options_reach_fuse(source: Path, text: Path, tmp_path: Path) -> None:
    report = _run("compress", source, tmp_path / "out", "--width", 16, "--calibration", text, "--optimizer", "sgd",
                  "--match", "auto", "--sequential", "--method", "prune", "--no-refit", "--json")  # fmt: skip
    known = report["settings"]
    assert (known["refit"], known["match"], known["sequential"], known["method"]) == (False, "gd", True, "prune")
    assert report["calibration"]["tokens"] > len(SENTENCES)
    assert report["sample"] == "the package's sentences"
    mlp_fusion.compress(source, tmp_path / "same", 16, method="prune", optimizer="sgd", calibration=text, refit=False,
                        match="auto", sequential=True)  # fmt: skip
    assert (tmp_path / "out" / ck.WEIGHTS).read_bytes() == (tmp_path / "same" / ck.WEIGHTS).read_bytes()
    assert mlp_fusion.verify(tmp_path / "out").passed


def test_more_text_and_rows_reach_fuse(source: Path, text: Path, tmp_path: Path) -> None:
    arguments = ["compress", source, "--width", 16, "--calibration", text, "--json"]
    whole, few, thin = (
        _run(*arguments[:2], tmp_path / name, *arguments[2:], *more)
        for name, more in (
            ("whole", ()),
            ("few", ("--calibration-sentences", 30)),
            ("thin", ("--calibration-rows", 40)),
        )
    )
    assert few["calibration"]["tokens"] < whole["calibration"]["tokens"] == thin["calibration"]["tokens"]
    assert thin["sample_rows"] == whole["sample_rows"]
    assert len({(tmp_path / name / ck.WEIGHTS).read_bytes() for name in ("whole", "few", "thin")}) == 3


def test_calibration_refits_unless_told_otherwise(source: Path, text: Path, tmp_path: Path) -> None:
    fitted = _run("compress", source, tmp_path / "a", "--width", 16, "--calibration", text, "--json")
    unfitted = _run("compress", source, tmp_path / "b", "--width", 16, "--json")
    assert fitted["settings"]["refit"]
    assert all(row["ridge"] is not None for row in fitted["rows"])
    assert unfitted["calibration"] is None
    # The output bias is fitted too, and reaches the file.
    name = "bert.encoder.layer.1.output.dense.bias"
    before, after, plain = (ck.tensors(folder)[name] for folder in (source, tmp_path / "a", tmp_path / "b"))
    assert (before == plain).all()
    assert not (before == after).all()


def test_automatic_widths_are_planned_and_written(source: Path, text: Path, tmp_path: Path) -> None:
    planned = _run("plan", source, "--width", "auto", "--budget", 0.5, "--json")
    assert {ffn["neurons_after"] for ffn in planned["ffns"]} == {WIDTH // 2}
    assert "calibration text decides" in planned["warnings"][0]
    out = tmp_path / "out"
    report = _run("compress", source, out, "--width", "auto", "--budget", 0.5, "--calibration", text, "--json")
    widths = [row["neurons_after"] for row in report["rows"]]
    assert sum(widths) <= 3 * WIDTH // 2
    for layer, width in enumerate(widths):
        assert ck.tensors(out)[f"bert.encoder.layer.{layer}.intermediate.dense.weight"].shape[0] == width
    assert mlp_fusion.verify(out).passed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match": "gd"}, "match needs calibration text"),
        ({"method": "select"}, "method select needs calibration text"),
        ({"width": "auto"}, "width auto and budget go together"),
        ({"budget": 0.5}, "width auto and budget go together"),
        ({"calibration": "no/such/file"}, "no such file"),
    ],
)
def test_refusals_come_before_anything_is_written(
    source: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        mlp_fusion.compress(source, tmp_path / "out", **{"width": 16, **options})
    assert list(tmp_path.iterdir()) == []


def test_calibration_needs_the_checkpoints_tokenizer(text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        mlp_fusion.compress(ck.save_tiny(tmp_path / "bare"), tmp_path / "out", 16, calibration=text)
    assert not (tmp_path / "out").exists()
