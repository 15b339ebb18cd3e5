"""The benchmarks' house: where they import from, what they keep, and that the index names every result."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mlp_fusion.settings import FinetuneSettings

BENCH = Path(__file__).parents[1] / "bench"
SCRIPTS = sorted(BENCH.glob("*.py"))


@pytest.fixture(scope="module")
def finetune() -> Iterator[ModuleType]:
    """bench/finetune.py, imported as Python does when it is run."""
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module("finetune")
    finally:
        sys.path.remove(str(BENCH))


def report(final: float) -> dict[str, Any]:
    """What `finetune` reports of a run, in plain JSON types."""
    return {
        "method": "fusion", "parameterization": "scaled", "settings": FinetuneSettings(task="lm").recorded(),
        "examples": 9, "metric": "accuracy", "initial": {"accuracy": 0.5}, "final": {"accuracy": final},
        "evaluations": [{"epoch": 1.0, "accuracy": final}], "seconds": 1.0, "model": "/a/folder",
        "train": [{"step": n, "loss": 1.0} for n in range(50)],
        "distillation": {"layerwise": {"steps": 50, "loss": [[n, 1.0] for n in range(50)]}},
    }  # fmt: skip


def test_benchmarks_import_nothing_from_the_examples_and_name_the_helpers_once() -> None:
    texts = {script.name: script.read_text(encoding="utf-8") for script in SCRIPTS}
    assert len(texts) > 10
    assert [name for name, text in texts.items() if re.search(r"from demo|import demo|/ .examples.", text)] == []
    assert [name for name, text in texts.items() if "sys.path" in text] == ["support.py"]


def test_every_result_stands_in_the_index_and_the_index_names_no_other() -> None:
    index = (BENCH / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `([\w.-]+\.json)` \|", index, flags=re.MULTILINE)
    assert sorted(named) == sorted(file.name for file in (BENCH / "results").iterdir() if file.suffix == ".json")
    assert [place for place in (BENCH / "results").iterdir() if place.is_dir()] == []
    for script in re.findall(r"bench/(\w+\.py)", index):
        assert (BENCH / script).is_file(), script


def test_a_run_takes_the_place_of_the_same_run_and_of_no_other(finetune: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "results" / "finetune-cpu.json"
    for mode, seed, final in (("fusion", 1, 0.6), ("fusion", 0, 0.7), ("full", 0, 0.8), ("fusion", 1, 0.9)):
        described = {"task": "sst2", "mode": mode, "seed": seed, "width": 0.25, "parameters": 5, "reduction": {}}
        finetune.record(file, finetune.summarised(described, report(final)))
    runs = finetune.recorded(file)
    assert [(r["mode"], r["seed"], r["final"]["accuracy"]) for r in runs] == [
        ("full", 0, 0.8), ("fusion", 0, 0.7), ("fusion", 1, 0.9),
    ]  # fmt: skip
    assert runs[0]["layerwise"]
    assert not runs[0]["logits"]
    assert "model" not in runs[0]
    assert max(len(value) for value in runs[0].values() if isinstance(value, list)) == 1


def test_the_kept_runs_are_as_a_new_run_would_write_them(finetune: ModuleType) -> None:
    file = BENCH / "results" / "finetune-cpu.json"
    runs = finetune.recorded(file)
    described = {"task", "mode", "seed", "width", "parameters", "reduction"}
    expected = set(finetune.summarised(dict.fromkeys(described), report(0.5)))
    assert {frozenset(run) for run in runs} == {frozenset(expected)}
    assert len(file.read_text(encoding="utf-8").splitlines()) == len(runs) + 2
    assert json.loads(file.read_text(encoding="utf-8")).keys() == {"runs"}
