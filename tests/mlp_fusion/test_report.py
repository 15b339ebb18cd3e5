"""`mlp-fusion report`: what it finds, what it refuses, and the page that it writes."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlp_fusion import InputError, cli
from mlp_fusion.measure.report import finite
from mlp_fusion.report import figures
from mlp_fusion.report.gather import find_results, read_run
from mlp_fusion.report.page import format_number, format_score, format_seconds, format_short
from mlp_fusion.report.summary import CURVE_POINTS, cluster_bins, summarize
from mlp_fusion.verbs.report import write_report
from reports import EVIL, finetune, fusion_report, parse, put

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of this version, of an earlier one and for inference; runs from one of them, and from elsewhere."""
    folder = tmp_path_factory.mktemp("results")
    put(folder / EVIL, report=fusion_report())
    put(folder / "deep" / "old", report=fusion_report(2, old=True, embeddings=None))
    put(folder / "folded", report=fusion_report(optimizer=None, parameterization="folded", method="published"))
    for seed in (0, 1):
        put(folder / "runs" / f"small-{seed}", run=finetune(seed, model=str(folder / EVIL), method="fusion"))
    layerwise = {"steps": 9, "loss": [[3, 0.5], [6, 0.25], [9, 0.125]]}
    both = {"layerwise": layerwise, "logits": {"weight": 0.5, "temperature": 2}}
    put(folder / "runs" / "big", run=finetune(distillation=both))
    put(
        folder / "runs" / "lm",
        run=finetune(task="lm", metric="perplexity", initial=None, final=None, train=[], evaluations=[]),
    )
    return folder


@pytest.fixture(scope="module")
def page(results: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """The page and the content of its JSON."""
    written = write_report(results, tmp_path_factory.mktemp("page") / "p.html", title=f"title {EVIL}")
    return written.page.read_text(encoding="utf-8"), json.loads(written.data.read_text(encoding="utf-8"))


# --- gather ----------------------------------------------------------------------------------------------------------


def test_results_are_found_to_two_levels_and_no_further(results: Path, tmp_path: Path) -> None:
    found = find_results(results)
    assert [c.name for c in found.checkpoints] == [EVIL, "deep/old", "folded"]
    assert [(g.name, [r.settings.seed for r in g.runs]) for g in found.groups] == [
        ("runs/big", [0]), ("runs/lm", [0]), ("runs/small", [0, 1]),
    ]  # fmt: skip
    put(tmp_path / "a" / "b" / "c", report=fusion_report())
    put(tmp_path / ".hidden", report=fusion_report())
    with pytest.raises(InputError, match=r"neither mlp_fusion/report\.json .* nor finetune\.json"):
        find_results(tmp_path)
    assert [c.name for c in find_results(tmp_path / "a").checkpoints] == ["b/c"]


def test_a_folder_that_is_a_result_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "one", report=fusion_report(), run=finetune())
    monkeypatch.chdir(tmp_path / "one")
    found = find_results(Path())
    assert [c.name for c in found.checkpoints] == [g.name for g in found.groups] == ["one"]
    assert summarize(found)["runs"][0]["checkpoint"] == "one"


def test_seeds_are_one_group_and_nothing_else_is(tmp_path: Path) -> None:
    for seed in (11, 2):
        put(tmp_path / f"run-seed{seed}", run=finetune(seed))
    faster = [{**point, "learning_rate": 1.0} for point in finetune()["train"]]
    others: dict[str, dict[str, Any]] = {
        "schedule": {"train": faster}, "rate": {"learning_rate": 1.0}, "size": {"batch_size": 9},
        "model": {"model": "other"}, "teacher": {"teacher": "big"}, "epochs": {"epochs": 3}, "task": {"task": "lm"},
        "optimizer": {"optimizer": "sgd"}, "form": {"parameterization": "split"}, "rows": {"examples": 3},
        "distilled": {"distillation": {"layerwise": None, "logits": {"weight": 1, "temperature": 2}}},
    }  # fmt: skip
    for name, changes in others.items():
        put(tmp_path / name, run=finetune(7, **changes))
    groups = find_results(tmp_path).groups
    assert [g.name for g in groups] == sorted([*others, "run-seed"])
    (seeds,) = [g for g in groups if len(g.runs) > 1]
    assert [r.settings.seed for r in seeds.runs] == [2, 11]


def test_a_run_is_read_whole(tmp_path: Path) -> None:
    layerwise = {"steps": 9, "loss": [[3, 0.5]]}
    both = {"layerwise": layerwise, "logits": {"weight": 0.5, "temperature": 2}}
    folder = put(tmp_path / "run", run=finetune(3, teacher="t", distillation=both, of_a_later_version=1))
    run = read_run(folder / "finetune.json", "run")
    assert (run.settings.seed, run.teacher, run.final and run.final.metric, run.evaluations[1].epoch) == (
        3,
        "t",
        1.0,
        2.0,
    )
    assert (run.initial and run.initial.loss, len(run.train), run.train[1].learning_rate) == (0.7, 10, 5e-5)
    assert run.distillation.layerwise_loss == ((3, 0.5),)
    assert run.distillation.logits == (0.5, 2.0)
    put(folder, run={key: value for key, value in finetune(initial=None).items() if key != "distillation"})
    assert read_run(folder / "finetune.json", "run").initial is None


def damage(change: Callable[[dict[str, Any]], Any], data: dict[str, Any]) -> dict[str, Any]:
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(format=3), "format 3 is not known, only 2: update mlp-fusion"),
        (lambda d: d.update(format=1), "it is of an earlier version, make it again"),
        (lambda d: d["settings"].pop("task"), "'settings': "),
        (lambda d: d["settings"].update(seed=True), "'settings': seed True: give an integer"),
        (lambda d: d["final"].pop("accuracy"), "'accuracy' is None, not a number"),
        (lambda d: d.update(final=[1]), "an object is expected, not [1]"),
        (lambda d: d.update(train={}), "'train' is {}, not a list"),
        (lambda d: d["train"][3].update(loss="low"), "'loss' is 'low', not a number"),
        (lambda d: d["settings"].update(task=5), "'settings': task 5: use classification or lm"),
        (lambda d: d["settings"].update(patience=5), "'patience'"),
        (lambda d: d.pop("settings"), "an object is expected"),
        (lambda d: d["distillation"].update(layerwise={"steps": 3, "loss": [[1]]}), r"'loss' holds [1]"),
    ],
)
def test_damaged_runs(change: Callable[[dict[str, Any]], Any], words: str, tmp_path: Path) -> None:
    file = put(tmp_path, run=damage(change, finetune())) / "finetune.json"
    with pytest.raises(InputError) as caught:
        find_results(tmp_path)
    assert str(caught.value).startswith(f"{file}: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("rows"), "'rows'"),
        (lambda d: d.update(rows=[]), "no FFN"),
        (lambda d: d.update(rows=[3]), "damaged"),
        (lambda d: d.update(of_a_later_version=1), "of_a_later_version"),
        (lambda d: d.update(format=3), "format 3 is not known, only 2: update mlp-fusion"),
        (lambda d: d.pop("format"), "format 1 is not known, only 2: it is of an earlier version, make it again"),
        (lambda d: d["settings"].update(method="magic"), "'settings': unknown method 'magic'"),
        (lambda d: d["settings"].update(seed=-1), "'settings': seed -1: give an integer"),
        (lambda d: d.update(sample=None), "'sample' is None"),
        (lambda d: d["rows"][0].pop("path"), "path"),
        (lambda d: d["rows"][1].update(output_error="x"), "'output_error' is 'x'"),
        (lambda d: d["rows"][1].update(cluster_sizes=[[1, 2, 3]]), "'cluster_sizes' holds [1, 2, 3]"),
        (lambda d: d["rows"][1]["ntk_error"].pop("sign"), "an object is expected"),
        (lambda d: d["rows"][1]["ntk_spectrum"]["gd"].update(after=["a"]), "'after' holds something"),
        (lambda d: d["embeddings"].update(mean="high"), "'mean' is 'high'"),
        (lambda d: d["calibration"].update(tokens="many"), "'tokens' is 'many'"),
    ],
)
def test_damaged_reports(change: Callable[[dict[str, Any]], Any], words: str, tmp_path: Path) -> None:
    file = put(tmp_path, report=damage(change, fusion_report())) / "mlp_fusion" / "report.json"
    with pytest.raises(InputError) as caught:
        find_results(tmp_path)
    assert str(caught.value).startswith(f"{file}: ")
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '{"format": 1', "\xff"])
def test_files_that_are_no_json_object(text: str, tmp_path: Path) -> None:
    (tmp_path / "finetune.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / 'finetune.json'}: damaged")):
        find_results(tmp_path)


# --- summary ---------------------------------------------------------------------------------------------------------


def test_cluster_bins_double() -> None:
    assert cluster_bins([[1, 300], [2, 4], [3, 5], [9, 1]]) == [[1, 1, 300], [2, 3, 9], [4, 7, 0], [8, 15, 1]]
    assert cluster_bins([[0, 2], [4, 1]]) == [[0, 0, 2], [1, 1, 0], [2, 3, 0], [4, 7, 1]]


def test_runs_meet_their_checkpoint(tmp_path: Path) -> None:
    put(tmp_path / "a" / "small", report=fusion_report(method="fusion"))
    put(tmp_path / "b" / "small", report=fusion_report(method="prune"))
    put(tmp_path / "by-path", run=finetune(1, model=str(tmp_path / "b" / "small"), method="fusion"))
    put(tmp_path / "by-name", run=finetune(2, model="/moved/small", method="fusion"))
    put(tmp_path / "hub", run=finetune(3, model="someone/small"))
    met = {run["name"]: run["checkpoint"] for run in summarize(find_results(tmp_path))["runs"]}
    assert met == {"by-path": "b/small", "by-name": "a/small", "hub": None}


def test_summary_has_a_row_per_result(page: tuple[str, dict[str, Any]]) -> None:
    rows = page[1]["summary"]
    assert [(row["name"], row["run"]) for row in rows] == [
        (EVIL, "runs/small"), ("deep/old", None), ("folded", None), ("runs/big", "runs/big"), ("runs/lm", "runs/lm"),
    ]  # fmt: skip
    first = rows[0]
    assert first["output_error"] == pytest.approx(0.125 + 1 / 9)
    assert (first["kernel"], first["ntk_error"]) == ("sign", pytest.approx(0.375 + 1 / 7))
    assert first["final"] == {"mean": 0.84375, "low": 0.8125, "high": 0.875}
    assert (rows[2]["kernel"], rows[2]["ntk_error"]) == (None, None)
    assert (rows[4]["initial"], rows[4]["final"]) == (None, None)


def test_curves_are_means_over_seeds_and_blocks(tmp_path: Path) -> None:
    steps = 2 * CURVE_POINTS + 1
    for seed in (0, 1):
        train = [{"step": s, "epoch": s / 10, "loss": s + 4.0 * seed, "learning_rate": 1.0} for s in range(steps)]
        put(tmp_path / f"r{seed}", run=finetune(seed, train=train))
    curves = summarize(find_results(tmp_path))["runs"][0]["curves"]
    train_curve = curves["train"]
    assert (train_curve["block"], len(train_curve["x"])) == (3, 134)
    assert (train_curve["x"][1], train_curve["mean"][1]) == (pytest.approx(0.4), pytest.approx(6.0))
    assert (train_curve["low"][1], train_curve["high"][1]) == (4.0, 8.0)
    # The evaluation before training comes first.
    assert curves["metric"]["x"] == [0.0, 1.0, 2.0]
    assert curves["metric"]["mean"] == [0.5, 0.78125, 0.78125]
    assert curves["layerwise"] is None


def test_numbers_as_people_read_them() -> None:
    assert [format_number(n) for n in (None, 0.12345, 12345.6, math.inf, math.nan)] == [
        "–", "0.123", "12,346", "infinite", "not a number",
    ]  # fmt: skip
    assert [format_score(n) for n in (None, 0.87123, math.nan)] == ["–", "0.8712", "not a number"]
    assert [format_short(n) for n in (12, 1234, 22_713_216, 7_000_000_000)] == ["12", "1.23 k", "22.7 M", "7 B"]
    assert [format_seconds(n) for n in (0.5, 300, 7200)] == ["0.5 s", "5 min", "2 h"]
    assert finite({"a": [1.5, math.inf, {"b": math.nan}]}) == {"a": [1.5, None, {"b": None}]}


# --- page ------------------------------------------------------------------------------------------------------------


def test_the_page_is_balanced_and_needs_nothing_else(page: tuple[str, dict[str, Any]]) -> None:
    parsed = parse(page[0])
    assert page[0].startswith("<!DOCTYPE html>")
    assert not {"script", "link", "img", "image", "iframe", "object", "b>&"} & set(parsed.tags)
    assert not [word for word in ("http:", "https:", "//", "@import", "url(data") if word in page[0]]
    assert "xmlns" not in page[0]
    identifiers = parsed.values("id")
    assert len(identifiers) == len(set(identifiers))
    targets = parsed.values("href") + re.findall(r"url\((#[^)]*)\)", page[0])
    assert targets
    assert {target.removeprefix("#") for target in targets} <= set(identifiers)
    assert all(target.startswith("#") for target in targets)


def test_every_figure_has_a_text_and_a_caption(page: tuple[str, dict[str, Any]]) -> None:
    parsed = parse(page[0])
    figures_found = parsed.tags.count("figure")
    # Errors of three, clusters of two, both spectra of two; two dot plots; training, metric, loss, distillation.
    assert figures_found == 3 + 2 + 4 + 2 + 4
    assert parsed.tags.count("figcaption") == parsed.values("role").count("img") == figures_found
    assert all(parsed.values("aria-label"))


def test_text_is_escaped(page: tuple[str, dict[str, Any]]) -> None:
    assert EVIL not in page[0]
    assert "<b>&" not in page[0]
    text = "".join(parse(page[0]).text)
    assert f"title {EVIL}" in text
    # In the plots too, where a dollar sign begins no formula.
    assert page[0].count('&lt;b&gt;&amp;"$x_1$</text>') == 2


def test_the_page_has_the_numbers_of_its_json(page: tuple[str, dict[str, Any]]) -> None:
    html, data = page
    cells = parse(html).cells
    for row in data["summary"]:
        if row["output_error"] is not None:
            assert format_number(row["output_error"]) in cells
            assert f"{format_number(row['ntk_error'])}{row['kernel'] or ''}" in cells
        if row["final"] is not None:
            assert any(cell.strip().startswith(format_score(row["final"]["mean"])) for cell in cells)
    for checkpoint in data["checkpoints"]:
        for layer in checkpoint["layers"]:
            row = [format_number(layer[key]) for key in ("output_error", "gd_error", "sign_error")]
            assert row in [cells[start : start + 3] for start in range(len(cells))]
    assert data["generator"] == "mlp-fusion report"
    assert data["title"] == f"title {EVIL}"


@pytest.mark.parametrize(
    ("report", "run", "present", "absent"),
    [
        (fusion_report(1), None, {"summary", "c0", "making"}, {"comparison", "learning"}),
        (None, finetune(), {"summary", "learning", "making"}, {"comparison", "c0"}),
        (fusion_report(2, old=True), finetune(train=[], evaluations=[]), {"c0", "learning"}, {"comparison"}),
    ],
)
def test_parts_that_are_missing_leave_no_empty_sections(
    report: Any, run: Any, present: set[str], absent: set[str], tmp_path: Path
) -> None:
    put(tmp_path / "only", report=report, run=run)
    html = write_report(tmp_path).page.read_text(encoding="utf-8")
    identifiers = set(parse(html).values("id"))
    assert present <= identifiers
    assert not absent & identifiers


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    report = fusion_report(2)
    report["rows"][0].update(output_error=math.inf, ntk_error={"gd": {"total": math.nan}, "sign": {"total": 0.0}})
    report["rows"][1]["ntk_spectrum"]["sign"]["after"] = [0.3, -0.1]
    diverged = finetune(final={"loss": math.nan, "accuracy": 0.5})
    for point in diverged["train"][4:]:
        point["loss"] = math.inf
    put(tmp_path / "one", report=report)
    put(tmp_path / "two", report=fusion_report(3), run=diverged)
    written = write_report(tmp_path)
    html = written.page.read_text(encoding="utf-8")
    parse(html)
    assert "infinite" in html
    assert "not a number" in html
    assert "NaN" not in written.data.read_text()
    assert written.content["checkpoints"][0]["layers"][0]["output_error"] is None


def test_null_stands_for_numbers_that_are_not_finite(tmp_path: Path) -> None:
    report = finite(fusion_report(2))
    report["rows"][0].update(output_error=None, ntk_error={"gd": {"total": None}, "sign": {"total": 0.0}})
    diverged = finetune(final={"loss": None, "accuracy": 0.5})
    diverged["train"][-1]["loss"] = None
    put(tmp_path / "one", report=report, run=diverged)
    written = write_report(tmp_path)
    assert "not a number" in written.page.read_text(encoding="utf-8")
    assert written.content["checkpoints"][0]["layers"][0]["output_error"] is None


def test_figures_have_the_same_bytes_every_time(
    results: Path, page: tuple[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib as mpl

    monkeypatch.setitem(mpl.rcParams, "font.size", 23.0)
    monkeypatch.setitem(mpl.rcParams, "axes.grid", True)
    before = dict(mpl.rcParams)
    written = write_report(results, tmp_path / "other.html", title=f"title {EVIL}")
    assert written.page.read_text(encoding="utf-8") == page[0]
    assert dict(mpl.rcParams) == before
    assert not re.search(r"\b20\d\d-\d\d", page[0])


def test_keys_show_what_the_figures_draw() -> None:
    layers = summarize_layers()
    svg = figures.errors_by_layer(layers, "x")
    assert all(figures.series_key(number)["color"] in svg for number in range(3))
    keys = [tuple(figures.series_key(number).items()) for number in range(18)]
    assert len(set(keys)) == 18
    assert svg.count("currentColor") > 5
    assert "#0a0b0c" not in svg


def summarize_layers() -> list[dict[str, Any]]:
    return [{"layer": n, "output_error": 0.1 * n + 0.1, "gd_error": 3.0, "sign_error": 0.2} for n in range(4)]


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `mlp-fusion report` with the given arguments: its exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mlp-fusion", "report", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return (code, *capfd.readouterr())

    return call


Command = Callable[..., tuple[int, str, str]]


def test_the_command_writes_a_page_and_its_json(run: Command, tmp_path: Path) -> None:
    put(tmp_path / "one", report=fusion_report(1))
    code, out, err = run(tmp_path)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == f"written: {tmp_path / 'report.html'}, {tmp_path / 'report.json'}"
    assert "one" in out
    assert "0.125" in out
    assert sorted(os.listdir(tmp_path)) == ["one", "report.html", "report.json"]
    # Again, over its own files; then elsewhere.
    code, out, err = run(tmp_path, "--json", "--title", "again")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads((tmp_path / "report.json").read_text())
    assert "<title>again</title>" in (tmp_path / "report.html").read_text()
    assert run(tmp_path, "--out", tmp_path / "one" / "x.htm")[0] == 0
    assert (tmp_path / "one" / "x.json").is_file()


def test_other_files_are_not_overwritten(run: Command, tmp_path: Path) -> None:
    folder = put(tmp_path / "one", report=fusion_report(1))
    kept = folder / "mlp_fusion" / "report.json"
    content = kept.read_bytes()
    for out in (folder / "mlp_fusion" / "report.html", tmp_path / "page.html"):
        (tmp_path / "page.json").write_text("{}")
        code, printed, err = run(tmp_path, "--out", out)
        assert (code, printed) == (2, "")
        assert f"{out.with_suffix('.json')} exists and is no report" in err
        assert not out.exists()
    assert kept.read_bytes() == content
    (tmp_path / "mine.html").write_text("<p>mine")
    assert run(tmp_path, "--out", tmp_path / "mine.html")[0] == 2
    assert (tmp_path / "mine.html").read_text() == "<p>mine"


def test_what_the_command_refuses(run: Command, tmp_path: Path) -> None:
    put(tmp_path / "one", report=fusion_report(1))
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.html").mkdir()
    cases: list[tuple[list[object], str]] = [
        ([tmp_path / "nowhere"], "nowhere: no such folder"),
        ([tmp_path / "empty"], "neither mlp_fusion/report.json"),
        ([tmp_path, "--out", tmp_path / "page.pdf"], "ends in .html"),
        ([tmp_path, "--out", tmp_path / "no" / "page.html"], "no such folder"),
        ([tmp_path, "--out", tmp_path / "folder.html"], "is a folder"),
    ]
    for arguments, words in cases:
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert words in err
        assert len(err.splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == ["empty", "folder.html", "one"]


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_without_the_extra(package: str, run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "one", report=fusion_report(1))
    monkeypatch.setitem(sys.modules, package, None)
    code, out, err = run(tmp_path)
    assert (code, out) == (2, "")
    assert err == f"mlp-fusion: the report needs {package}: pip install 'mlp-fusion[report]'\n"
    assert os.listdir(tmp_path) == ["one"]
