"""The benchmark of recovery: forms of one function, the search for a learning rate, and what it writes down."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.usefixtures("importable")


@pytest.fixture(scope="module")
def recovery(importable: None) -> ModuleType:
    return importlib.import_module("recovery")


@pytest.fixture(scope="module")
def students(importable: None) -> ModuleType:
    return importlib.import_module("recovery_students")


@pytest.fixture
def house(students: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of a model of two layers of 32 neurons, which has hardly been trained."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setattr(students, "SHAPE", shape)
    monkeypatch.setattr(students, "TRAINING", {**students.TRAINING, "steps": 3, "length": 16})
    small = dataclasses.replace(students.MODELS["small"], length=16, evaluation=4, calibration=8, calibration_length=16)
    monkeypatch.setitem(students.MODELS, "small", small)
    words = [f"word{n % 97} of line {n % 53}" for n in range(2000)]
    (tmp_path / "tiny_shakespeare.txt").write_text("\n".join(words), encoding="utf-8")
    return students.House("small", tmp_path, tmp_path / "work", None)


def test_forms_of_a_student_compute_the_same_and_train_differently(recovery: ModuleType, house: Any) -> None:
    for optimizer, learning_rate in (("adamw", 1e-2), ("sgd", 0.3)):
        found = {}
        for name in ("fusion, folded", "fusion", "fusion, matched"):
            model, known = house.student(name, 0.25, 0, optimizer)
            cell = recovery.Cell("small", 0.25, name, optimizer)
            losses = recovery.train(
                model, house, cell, learning_rate=learning_rate, seed=0, steps=10, blocks=house.text.held_out,
                teacher=None,
            )  # fmt: skip
            assert list(losses) == ["0", "10"]
            found[name] = losses, known
        starts = [losses["0"] for losses, _ in found.values()]
        ends = {losses["10"] for losses, _ in found.values()}
        assert max(starts) - min(starts) < 1e-4
        assert len(ends) == 3
        assert max(ends) < min(starts)
        folded, sized, matched = (known for _, known in found.values())
        assert folded["largest_scale"] == 1.0 < sized["largest_scale"]
        assert matched["kernel_error"] < min(folded["kernel_error"], sized["kernel_error"])


def test_a_run_is_done_once_and_the_best_rate_lies_between_worse_ones(
    recovery: ModuleType,
    house: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(recovery, "SEARCH", {"small": 3})
    file = tmp_path / "recovery.json"
    runs = recovery.Runs(file, lambda _: house)
    runs.original("small", 0)
    cell = recovery.Cell("small", 0.25, "fusion, matched", "adamw", lora=True, taught=True)
    runs.cell(cell, 4, 2)
    lines = recovery.recorded(file)
    assert [line["seed"] for line in lines["originals"]] == [0]
    searched = {run["learning_rate"]: run["losses"]["3"] for run in lines["runs"] if run["search"]}
    final = [run for run in lines["runs"] if not run["search"]]
    assert [run["seed"] for run in final] == [0, 1]
    chosen = sorted(searched).index(final[0]["learning_rate"])
    assert 0 < chosen < len(searched) - 1
    assert searched[final[0]["learning_rate"]] == min(searched.values())
    before = file.read_bytes()
    monkeypatch.setattr(recovery, "train", None)  # would raise, if it were called
    runs.cell(cell, 4, 2)
    runs.original("small", 0)
    assert file.read_bytes() == before
    recovery.summary(file)
    assert "small 0.25 adamw LoRA, taught" in capsys.readouterr().out


def test_rates_are_searched_uphill_and_downhill(recovery: ModuleType) -> None:
    assert [recovery.rate(n) for n in (-3, -2, -1, 0, 1, 2)] == [0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
    for best in range(-9, 9):
        seen: list[int] = []
        assert recovery.best_rung(0, lambda n, best=best, seen=seen: seen.append(n) or abs(n - best)) == best
        assert {best - 2, best - 1, best, best + 1, best + 2} <= set(seen)
    # A rate that is too high may end below the next lower one: (rung, loss) of folded fusion with SGD.
    swinging = {-2: 3.01, -3: 3.01, -4: 2.09, -5: 2.24, -6: 2.05, -7: 2.10, -8: 2.12}
    assert recovery.best_rung(-4, swinging.__getitem__) == -6
    # Where training fails, the loss is infinite; a failure that ends with a number is none to go on from.
    assert recovery.best_rung(0, lambda n: 50.0 if n == 1 else float("inf") if n > -4 else abs(n + 6)) == -6


def test_a_training_that_fails_ends_with_what_it_had(recovery: ModuleType, house: Any) -> None:
    model, _ = house.student("prune, no text", 0.25, 0, "sgd")
    cell = recovery.Cell("small", 0.25, "prune, no text", "sgd")
    losses = recovery.train(
        model, house, cell, learning_rate=float("inf"), seed=0, steps=20, blocks=house.text.held_out, teacher=None
    )
    assert list(losses) == ["0"]
    assert all(isinstance(value, float) for value in losses.values())


def test_the_kept_runs_are_of_the_parts(recovery: ModuleType, students: ModuleType) -> None:
    for name in ("recovery-cpu.json", "recovery-long-cpu.json"):
        found = json.loads((Path(recovery.__file__).parent / "results" / name).read_text(encoding="utf-8"))
        cells = {cell for part in recovery.PARTS.values() for cell in part.cells()}
        names = [field.name for field in dataclasses.fields(recovery.Cell)]
        assert {recovery.Cell(*(run[name] for name in names)) for run in found["runs"]} <= cells
        assert not torch.tensor([loss for run in found["runs"] for loss in run["losses"].values()]).isnan().any()


def test_the_page_says_what_the_runs_say() -> None:
    tables = importlib.import_module("recovery_tables")

    def differing(
        optimizer: str, first: str, second: str, *steps: int, of: str = "full", seeds: int = 3
    ) -> list[float]:
        found = [tables.differing(tables.GROUPS[of], optimizer, first, second, step) for step in steps]
        assert all(len(values) == seeds for values in found)
        return [value for values in found for value in values]

    steps_here = [step for step in tables.STEPS if step <= 200]
    assert all(-0.135 < d < -0.08 for d in differing("sgd", "fusion", "fusion, folded", 200))
    assert all(-0.02 < d < -0.01 for d in differing("sgd", "fusion, no text", "fusion, no text, folded", 200))
    kept = ("fusion", "fusion, matched")
    assert all(-0.025 < d < -0.01 for form in kept for d in differing("adamw", form, "fusion, folded", 10))
    later = [d for form in kept for d in differing("adamw", form, "fusion, folded", 20, 50, 100, 200)]
    assert -0.02 < min(later) < 0 < max(later) < 0.02
    blind = differing("adamw", "fusion, no text", "fusion, no text, folded", 20, 50, 100, 200)
    assert all(-0.05 < d < -0.005 for d in blind)
    for optimizer in ("adamw", "sgd"):
        assert max(differing(optimizer, "fusion, no text", "prune, no text", *steps_here)) < 0
        assert all(-0.175 < d < -0.02 for d in differing(optimizer, "fusion, no text", "prune, no text", 200))
    assert all(-0.03 < d < -0.005 for d in differing("adamw", "fusion, matched", "prune", 50, 200))
    assert max(differing("sgd", "fusion, matched", "prune", 20, 50, 100)) < 0
    for optimizer, steps in (("adamw", (10, 20, 100)), ("sgd", (200,))):
        for step in steps:
            assert sum(d < 0 for d in differing(optimizer, "fusion, matched", "prune", step)) == 2
    for optimizer in ("adamw", "sgd"):
        for other in (*kept, "prune"):
            assert max(differing(optimizer, "auto", other, *steps_here)) < 0
            assert all(-0.095 < d < -0.025 for d in differing(optimizer, "auto", other, 200))
        assert max(map(abs, differing(optimizer, "auto, matched", "auto", *steps_here))) < 0.0135
    assert all(-0.225 < d < -0.09 for d in differing("sgd", "prune, matched", "prune", 20))
    assert all(-0.02 < d < 0 for d in differing("sgd", "prune, matched", "prune", 200))
    # Forms of one function start with one loss.
    starts = [differing(o, a, b, 0) for o in ("adamw", "sgd") for a, b in tables.PAIRS[:5]]
    assert max(abs(d) for own in starts for d in own) < 1e-4
    # A thousand steps, logits, LoRA.
    folded, matched = "fusion, folded", "fusion, matched"
    assert max(differing("sgd", matched, folded, *tables.STEPS[2:], of="long")) < 0
    assert all(-0.09 < d < -0.03 for d in differing("sgd", matched, folded, 1000, of="long"))
    assert all(-0.225 < d < -0.155 for d in differing("sgd", matched, folded, 200, of="lora"))
    assert all(-0.305 < d < -0.105 for d in differing("sgd", matched, folded, 200, of="taught"))
    assert max(differing("sgd", matched, "prune", *tables.STEPS[3:], of="long")) < 0
    assert all(-0.03 < d < -0.015 for d in differing("sgd", matched, "prune", 1000, of="long"))
    assert all(-0.0315 < d < -0.0015 for d in differing("adamw", matched, folded, 10, 20, 50, 200, of="taught"))
    assert max(differing("adamw", matched, folded, 10, of="long")) < 0
    assert all(0.0015 < d < 0.0215 for d in differing("adamw", matched, folded, 1000, of="long"))
    assert all(abs(d) < 0.02 for o in (folded, "prune") for d in differing("adamw", matched, o, 200, of="lora"))
    for other in (folded, matched, "prune"):
        for optimizer, least in (("adamw", -0.075), ("sgd", -0.135)):
            for group in ("long", "lora", "taught"):
                steps = tables.STEPS if group == "long" else steps_here
                assert max(differing(optimizer, "auto", other, *steps, of=group)) < 0
            assert all(least < d < 0 for d in differing(optimizer, "auto", other, 1000, of="long"))
        assert max(differing("sgd", "auto", other, 1000, of="long")) < -0.015
        assert all(-0.075 < d < -0.025 for d in differing("adamw", "auto", other, 200, of="lora"))
    # SmolLM2.
    for other in (folded, matched, "prune"):
        found = differing("adamw", "auto", other, 0, 10, 20, 50, 100, 200, of="smollm2", seeds=1)
        assert all(-0.135 < d < -0.03 for d in found)
        assert max(differing("adamw", "auto", other, 0, 10, 20, 50, 100, 200, of="smollm2-lora", seeds=1)) < -0.03
    apart = {step: differing("adamw", matched, folded, step, of="smollm2-lora", seeds=1)[0] for step in steps_here[1:]}
    assert [step for step, d in apart.items() if d < 0] == [100]
    behind = differing("sgd", matched, folded, 10, 20, of="smollm2", seeds=1)
    assert min(behind) > 0.01 > -0.01 > differing("sgd", matched, folded, 50, of="smollm2", seeds=1)[0] > -0.0155
