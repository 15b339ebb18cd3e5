"""`mlp-fusion report` on what `distill` and `squeeze` leave."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlp_fusion import InputError
from mlp_fusion.report.gather import find_results
from mlp_fusion.report.page import format_number
from mlp_fusion.report.summary import summarize
from mlp_fusion.verbs.report import write_report
from reports import EVIL, distillation, finetune, fusion_report, parse, put, squeezing

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A student, two squeezed models with what their last fine-tuning left, and one that is not done."""
    put(tmp_path / EVIL, distill=distillation())
    put(tmp_path / "small", squeeze=squeezing(), run=finetune(5))
    put(tmp_path / "smaller", squeeze=squeezing(chosen=2), run=finetune(6))
    put(tmp_path / "begun", squeeze=squeezing())
    put(tmp_path / "begun" / "rounds" / "0", run=finetune(7))
    return tmp_path


def test_they_are_found_and_their_rounds_are_no_runs(folder: Path) -> None:
    found = find_results(folder)
    assert [one.name for one in found.students] == [EVIL]
    assert [(one.name, one.chosen) for one in found.squeezed] == [("small", 1), ("smaller", 2)]
    assert [group.name for group in found.groups] == []
    with pytest.raises(InputError, match=r"neither .* \(by distill\) or squeeze\.json \(by squeeze\)"):
        find_results(folder / "begun")
    (student,) = found.students
    assert (student.layers, student.settings.seed, student.examples) == ((2, 4), 4, 640)
    assert student.evaluations == ((0.0, 9.5), (1.0, 4.5), (2.0, -0.5))


def test_a_row_each(folder: Path) -> None:
    rows = {row["name"]: row for row in summarize(find_results(folder))["summary"]}
    assert list(rows) == [EVIL, "small", "smaller"]
    student, model = rows[EVIL], rows["smaller"]
    assert (student["method"], student["metric"]) == ("distill", "loss")
    assert [student[key]["mean"] for key in ("initial", "final")] == [9.5, 3.125]
    assert [student[f"parameters_{when}"] for when in ("before", "after")] == [22_000_000, 5_000_000]
    assert (model["method"], model["metric"]) == ("squeeze", "accuracy")
    assert [model[key]["mean"] for key in ("initial", "final")] == [0.875, 0.75]
    assert [model[f"parameters_{when}"] for when in ("before", "after")] == [1000, 800]


def test_the_page_has_their_numbers(folder: Path) -> None:
    put(folder / "fused", report=fusion_report(1))
    put(folder / "run", run=finetune())
    written = write_report(folder, title="t")
    html = written.page.read_text(encoding="utf-8")
    parsed = parse(html)
    assert {"summary", "c0", "learning", "students", "squeezed", "making"} <= set(parsed.values("id"))
    text = " ".join("".join(parsed.text).split())
    assert "1 fused checkpoint, 1 fine-tuning run, 1 distilled student, 2 squeezed models." in text
    cells = [" ".join(cell.split()) for cell in parsed.cells]
    for part, pair in {"loss": "9.5, 3.125", "mlm": "6.25, 6.25", "hidden": "0.75, 0.75"}.items():
        assert f"{part}before, after" in cells
        assert pair in cells
    for number, one in enumerate(squeezing()["rounds"]):
        expected = [f"{one['parameters']:,}", f"{one['parameters'] / 10:.1f} %", format_number(one["error"] ** 0.5)]
        at = [n for n, cell in enumerate(cells) if cell == expected[0] and cells[n + 1 : n + 3] == expected[1:]]
        assert len(at) == 2, one
        assert {cells[n - 1] for n in at} == {str(number), *([f"{number}, written"] if number else [])}
    # Errors, clusters, spectra; training, metric, loss of the run; two of the student, one of the squeezed models.
    assert parsed.tags.count("figure") == parsed.values("role").count("img") == 4 + 3 + 2 + 1
    assert EVIL not in html
    assert json.loads(written.data.read_text(encoding="utf-8")) == written.content
    assert EVIL in written.table()


@pytest.mark.parametrize("name", ["distill", "squeeze"])
def test_one_alone(name: str, tmp_path: Path) -> None:
    put(tmp_path / "only", **{name: distillation() if name == "distill" else squeezing()})
    identifiers = set(parse(write_report(tmp_path).page.read_text(encoding="utf-8")).values("id"))
    sections = {"distill": "students", "squeeze": "squeezed"}
    assert sections.pop(name) in identifiers
    assert not {*sections.values(), "learning", "c0", "comparison"} & identifiers


def test_students_that_were_not_measured_and_numbers_that_are_not_finite(tmp_path: Path) -> None:
    put(tmp_path / "bare", distill=distillation(initial=None, final=None, evaluations=[], train=[]))
    rounds = squeezing()["rounds"]
    put(tmp_path / "lost", squeeze=squeezing(rounds=[*rounds[:2], {**rounds[2], "loss": None}]))
    written = write_report(tmp_path)
    assert "not a number" in written.page.read_text(encoding="utf-8")
    assert "NaN" not in written.data.read_text(encoding="utf-8")
    assert math.isfinite(written.content["squeezed"][0]["rounds"][1]["loss"])


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("distill", lambda d: d.update(format=2), "format 2 is not known, only 1: update mlp-fusion"),
        ("distill", lambda d: d.update(layers=["2"]), "'layers' is ['2']"),
        ("distill", lambda d: d["settings"].update(start="else"), "'settings': start 'else': use teacher or random"),
        ("distill", lambda d: d["final"].update(mlm="low"), "'mlm' is 'low', not a number"),
        ("squeeze", lambda d: d.update(chosen=3), "'chosen' is 3 of 3 rounds"),
        ("squeeze", lambda d: d["rounds"][1].pop("accuracy"), "'accuracy' is None, not a number"),
        ("squeeze", lambda d: d.update(rounds={}), "'rounds' is {}, not a list"),
    ],
)
def test_damaged_files(name: str, change: Callable[[dict[str, Any]], Any], words: str, tmp_path: Path) -> None:
    data = distillation() if name == "distill" else squeezing()
    change(data)
    file = put(tmp_path / "one", **{name: data}) / f"{name}.json"
    with pytest.raises(InputError) as raised:
        find_results(tmp_path)
    assert str(raised.value).startswith(f"{file}: ")
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
