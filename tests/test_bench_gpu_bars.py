"""The bars of bench/gpu.py: from numbers that are made up, whether each holds, and what is said where there is none."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("importable")


@pytest.fixture
def of_bars(importable: None) -> ModuleType:
    return importlib.import_module("gpu_bars")


def times(**ms: float) -> dict[str, Any]:
    return {name.replace("_", " "): {"median": value} for name, value in ms.items()}


def judged(of_bars: ModuleType, stage: str, line: str, result: dict[str, Any]) -> list[Any]:
    """Whether each bar of that line holds, in the order of the bars."""
    found = of_bars.bars({stage: {line: result}}, {})
    return [entry["holds"] for entry in found if entry["line"] == f"{stage}: {line}"]


@pytest.mark.parametrize(
    ("ours", "inertia", "holds"),
    [(5.0, 0.3, True), (4.9, 0.29, True), (5.1, 0.3, False), (1.0, 0.31, False), (5.0, 0.30001, True)],
)
def test_kmeans_beside_the_fastest_peer(of_bars: ModuleType, ours: float, inertia: float, holds: bool) -> None:
    ms = {**times(default=ours, lloyd=1.0), "torch bf16, given, 15 passes": {"median": 20.0}}
    ms["flash-kmeans bf16"] = {"median": 10.0}
    inertias = {"default": inertia, "lloyd": 0.4, "torch bf16, given, 15 passes": 0.4, "flash-kmeans bf16": 0.3}
    assert judged(of_bars, "kmeans", "bert: modes", {"ms": ms, "inertia": inertias}) == [holds]
    alone = {"ms": times(default=ours), "inertia": inertias}
    assert judged(of_bars, "kmeans", "bert: modes", alone) == [None]


@pytest.mark.parametrize(("ms", "holds"), [(1499.0, True), (1500.0, False)])
def test_a_whole_layer(of_bars: ModuleType, ms: float, holds: bool) -> None:
    assert judged(of_bars, "kmeans", "mixtral: whole layer", {"ms": times(default=ms)}) == [holds]


@pytest.mark.parametrize(
    ("epilogue", "d", "holds"),
    [(1.0, 768, [True, True]), (1.01, 768, [False, True]), (1.0, 2048, [True]), (1.2, 2048, [False])],
)
def test_a_training_step(of_bars: ModuleType, epilogue: float, d: int, holds: list[bool]) -> None:
    ms = times(eager=2.0, compile=1.12, torch=1.5, epilogue=epilogue)
    shares = {name: 0.86 / row["median"] for name, row in ms.items()}
    result = {"d": d, "ms": ms, "share of the floor": shares}
    assert judged(of_bars, "mlp", "a block: training step", result) == holds
    assert of_bars.over_compiled(ms) == pytest.approx({"torch": 1.12 / 1.5, "epilogue": 1.12 / epilogue})
    assert of_bars.over_compiled(times(epilogue=1.0)) == {}


def test_peers_that_reach_the_floor_are_not_ours(of_bars: ModuleType) -> None:
    shares = {"eager": 0.9, "resident, forward only": 0.99, "cublas": 0.84}
    result = {"d": 768, "ms": times(compile=1.0), "share of the floor": shares}
    assert judged(of_bars, "mlp", "a block: forward", result) == [False]


def test_what_was_not_measured_says_why(of_bars: ModuleType) -> None:
    stages = {"kmeans": {"mixtral: whole layer": {"skipped": "needs 33 GiB"}}}
    failures = {"mlp": {"a block: training step": {"type": "TimeoutError", "message": "did not end"}}}
    found = of_bars.bars(stages, failures)
    assert {entry["holds"] for entry in found} == {None}
    said = [of_bars.in_words(entry) for entry in found]
    assert any(line.endswith("not measured: needs 33 GiB") for line in said)
    assert sum(line.endswith("not measured: TimeoutError: did not end") for line in said) == 2
    assert sum(line.endswith("not measured: not reached") for line in said) == 2
    assert all(line.startswith("UNKNOWN: ") for line in said)


def test_lines_of_other_kernels_say_so(of_bars: ModuleType) -> None:
    result = {"ms": times(default=1.0), "found with": {"kernels": "1"}}
    found = of_bars.bars({"kmeans": {"mixtral: whole layer": result}}, {})
    (entry,) = (entry for entry in found if entry["holds"])
    assert entry["found with"] == {"kernels": "1"}
    assert of_bars.in_words(entry).startswith("HOLDS: kmeans: mixtral: whole layer: ")
    assert of_bars.in_words(entry).endswith(", by other kernels")
