"""bench/gpu.py: its stages run one after the other whatever becomes of them, and nothing that is found gets lost.

Stages here are stand-ins without a GPU; those of the benchmark are in test_bench_gpu_stages.py.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"
pytestmark = pytest.mark.usefixtures("importable")
STAND_INS = """
import json, os, sys, time
from pathlib import Path


def reads(file):
    until = time.monotonic() + 5
    while time.monotonic() < until:
        stages = json.loads(file.read_text())["stages"]
        if "good" in stages:
            return {"seen": list(stages["good"])}
    return {"seen": []}


def lines(told):
    folder = Path(told.options["folder"])
    with (folder / "processes").open("a") as file:
        file.write(f"{told.options.get('stage')}\\n")
    yield "first", lambda: {"value": 1, "brief": "one"}
    yield "reads the file", lambda: reads(folder / "out.json")
    if told.options.get("bad"):
        yield "raises", lambda: 1 / 0
        yield "exits", lambda: sys.exit("no such model")
        yield "wrong", lambda: {"value": 2, "failed": "errs by 3"}
        yield "is no JSON", lambda: {"value": object()}
        yield "ends its process", lambda: (print("last words", flush=True), os._exit(7))
        yield "never ends", lambda: time.sleep(600)
    yield "last", lambda: {"known": sorted(told.found.get("device", {}))}
"""
SLOW = """
import time


def lines(told):
    for number in range(500):
        yield f"line {number}", lambda: (time.sleep(0.2), {"value": 1})[1]
"""


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`gpu_running`, whose processes find the stand-ins."""
    sources = {"good_stage": STAND_INS, "slow_stage": SLOW, "broken_stage": "import nothing_of_the_kind"}
    sources["short_stage"] = "def lines(told):\n    yield 'only', lambda: {'value': 1}\n"
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return importlib.import_module("gpu_running")


def stage(running: ModuleType, name: str, module: str, seconds: float = 20.0, line_seconds: float = 10.0) -> Any:
    return running.Stage(name, seconds, line_seconds, module, "a stand-in")


def kept(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    return found


def run(running: ModuleType, folder: Path, stages: list[Any], seconds: float = 60.0, **options: Any) -> list[str]:
    record, said = running.Record(), []
    record.keep(folder / "out.json")
    running.run(stages, record, {"folder": str(folder), **options}, seconds, said.append)
    return said


def test_every_line_is_in_the_file_while_the_next_goes_on(running: ModuleType, tmp_path: Path) -> None:
    said = run(running, tmp_path, [stage(running, "good", "good_stage")])
    found = kept(tmp_path)
    assert found["stages"]["good"]["reads the file"]["seen"] == ["first"]
    assert found["failures"] == {}
    assert said[0] == "good: first: one"
    assert [*found["taken"]] == ["good"]
    assert found["taken"]["good"]["left out for lack of time"] == []
    assert list(tmp_path.glob("*.new")) == []


def test_what_fails_is_kept_and_the_run_goes_on(running: ModuleType, tmp_path: Path) -> None:
    stages = [stage(running, "good", "good_stage", line_seconds=3.0), stage(running, "broken", "broken_stage"),
              stage(running, "after", "short_stage")]  # fmt: skip
    run(running, tmp_path, stages, bad=True)
    found = kept(tmp_path)
    assert [*found["stages"]["good"]] == ["first", "reads the file", "wrong", "last"]
    failures = found["failures"]["good"]
    assert failures["raises"] == {"type": "ZeroDivisionError", "message": "division by zero"}
    assert failures["exits"] == {"type": "SystemExit", "message": "no such model"}
    assert failures["wrong"] == {"type": "Failed", "message": "errs by 3"}
    assert failures["is no JSON"]["type"] == "TypeError"
    assert failures["ends its process"] == {
        "type": "ProcessEnded", "message": "its process ended with status 7: last words",
    }  # fmt: skip
    assert failures["never ends"]["type"] == "TimeoutError"
    assert failures["never ends"]["message"].startswith("did not end within ")
    # Three processes: after the one that ended, and after the one that had to be ended.
    assert (tmp_path / "processes").read_text(encoding="utf-8").count("\n") == 3
    assert "nothing_of_the_kind" in found["failures"]["broken"]["broken"]["message"]
    assert found["stages"]["after"]["only"]["value"] == 1


def test_a_device_that_has_become_unusable_is_left_for_another_process(
    running: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (
        "import gpu_running, os\n"
        "gpu_running._device_lives = lambda: False\n"
        "def lines(told):\n"
        "    began = os.getpid()\n"
        "    yield 'before', lambda: {'process': began}\n"
        "    yield 'illegal', lambda: 1 / 0\n"
        "    yield 'after it', lambda: {'process': began}\n"
        "    yield 'and on', lambda: {'process': began}\n"
    )
    (tmp_path / "dying_stage.py").write_text(source, encoding="utf-8")
    # The process runs as a script: what it looks up is its own.
    script = "import sys, json, gpu_running as g, importlib; sys.exit(g.serve(json.load(sys.stdin)))"
    monkeypatch.setattr(running, "CHILD", ["-c", script])
    run(running, tmp_path, [stage(running, "dying", "dying_stage")])
    found = kept(tmp_path)
    assert found["failures"] == {"dying": {"illegal": {"type": "ZeroDivisionError", "message": "division by zero"}}}
    lines = found["stages"]["dying"]
    assert lines["before"]["process"] != lines["after it"]["process"] == lines["and on"]["process"]


def test_shares_and_the_whole_are_kept(running: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "GRACE", 0.5)
    stages = [stage(running, "slow", "slow_stage", 2.0), stage(running, "good", "good_stage", 4.0)]
    began = time.monotonic()
    run(running, tmp_path, stages, seconds=6.0)
    # Lines of 100 seconds, of which the share is 2: a dozen fit, however fast the machine.
    assert time.monotonic() - began < 50
    found = kept(tmp_path)
    lines, left = found["stages"].get("slow", {}), found["taken"]["slow"]["left out for lack of time"]
    assert len(lines) <= 15
    assert left
    assert not lines or len(lines) + len(left) == 500
    assert "slow" not in found["failures"]
    assert "good" in found["stages"]


def test_shares_are_in_proportion(running: ModuleType) -> None:
    stages = [stage(running, "a", "a", 30.0), stage(running, "b", "b", 10.0)]
    assert [share for _, share in running.planned(stages, 20.0)] == [15.0, 5.0]


def test_a_later_run_goes_on_where_one_has_ended(running: ModuleType, tmp_path: Path) -> None:
    good, other = stage(running, "good", "good_stage"), stage(running, "other", "good_stage")
    again = running.Stage("anew", 1, 1, "m", "", lasting=False)
    wrong = {"type": "T", "message": "m"}
    before = {
        "stages": {
            "good": {"first": {"value": 5}, "last": {"skipped": "no tool"}}, "other": {"first": {"skipped": "none"}},
            "anew": {"first": {"value": 1}}, "device": {"facts": {"value": "old"}},
        },
        "failures": {"good": {"reads the file": wrong}, "other": {"x": wrong}},
    }  # fmt: skip
    record = running.Record()
    record.add("device", "facts", {"value": "new"})
    record.adopt(before, [good, again])
    assert record.stages["good"] == {"first": {"value": 5}}
    assert record.stages["other"] == {"first": {"skipped": "none"}}
    assert record.stages["device"] == {"facts": {"value": "new"}}
    assert "anew" not in record.stages
    assert [*record.failures] == ["other"]
    record.keep(tmp_path / "out.json")
    said: list[str] = []
    running.run([good], record, {"folder": str(tmp_path)}, 30.0, said.append)
    assert [line.split(": ")[1] for line in said] == ["reads the file", "last"]
    assert kept(tmp_path)["stages"]["good"]["last"]["known"] == ["facts"]
    assert other.lasting


def test_what_is_over_gets_no_share_of_a_later_run(running: ModuleType, tmp_path: Path) -> None:
    def names(stages: list[Any], kept: dict[str, Any]) -> list[str]:
        return [one.name for one in running.outstanding(stages, kept)]

    good, broken, slow = (stage(running, name, f"{name}_stage") for name in ("good", "broken", "slow"))
    ahead = running.Stage("ahead", 1, 10, "short_stage", "", lasting=False)
    record = running.Record()
    record.keep(tmp_path / "out.json")
    running.run([ahead, good, broken], record, {"folder": str(tmp_path)}, 60.0, lambda _: None)
    running.run([slow], record, {"folder": str(tmp_path)}, 1.0, lambda _: None)
    found = kept(tmp_path)
    assert names([ahead, good, broken, slow], found) == ["ahead", "broken", "slow"]
    assert names([ahead, good], found) == []
    assert names([ahead], found) == ["ahead"]
    # What was not begun, skipped or failed without a result is not over; what has failed with one will do so again.
    assert names([stage(running, "new", "m")], found) == ["new"]
    lines = found["stages"]["good"]
    lines["first"]["failed"] = "errs"
    found["failures"]["good"] = {"first": {}}
    assert names([good], found) == []
    found["failures"]["good"]["lost"] = {}
    assert names([good], found) == ["good"]
    del found["failures"]["good"]
    lines["first"]["skipped"] = "no tool"
    assert names([good], found) == ["good"]
    # What an earlier run says of its stages stays.
    later = running.Record()
    later.adopt(found, [good])
    assert later.notes["taken"]["good"] == found["taken"]["good"]


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(importable: None) -> ModuleType:
    return importlib.import_module("gpu")


DEVICE_STAND_IN = """
def lines(told):
    yield "facts", lambda: {"about": {"device": "A", "kernels": told.options["scratch"] and "1"}, "brief": "a stand-in"}
"""


def test_a_run_and_one_that_goes_on_with_it(
    command: ModuleType, running: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "device_stage.py").write_text(DEVICE_STAND_IN, encoding="utf-8")
    ahead = running.Stage("compile", 1, 20, "short_stage", "", lasting=False)
    monkeypatch.setattr(command, "DEVICE", stage(running, "device", "device_stage"))
    monkeypatch.setattr(
        command, "STAGES", (ahead, stage(running, "short", "short_stage"), stage(running, "broken", "no"))
    )
    out = tmp_path / "out.json"

    def of_run(*arguments: str) -> tuple[int, dict[str, Any], str]:
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(out), "--seconds", "60", *arguments])
        return command.main(), kept(tmp_path), capsys.readouterr().out

    status, first, said = of_run()
    assert status == 1
    assert [*first["stages"]] == ["device", "compile", "short"]
    assert [*first["failures"]] == ["broken"]
    assert len(first["bars"]) == said.count("UNKNOWN: ") > 3
    (tmp_path / "no.py").write_text("def lines(told):\n    yield 'stages', lambda: {'of': told.options['stages']}\n")
    status, second, said = of_run("--resume")
    assert status == 0
    # What is over has no share, and the rest has all of the time.
    assert [*second["plan"]] == ["device", "compile", "broken"]
    assert second["stages"]["broken"]["stages"]["of"] == ["compile", "broken"]
    assert second["stages"]["short"] == first["stages"]["short"]
    assert [*second["taken"]] == ["device", "compile", "short", "broken"]
    assert " short: " not in said


def gpu(*arguments: str, checkout: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, str(checkout / "bench" / "gpu.py"), *arguments], env=clean | environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


def test_the_plan_is_printed_without_a_gpu_and_fits(command: ModuleType) -> None:
    done = gpu("--plan")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[2] for row in rows[:-1]] == ["device", *(stage.name for stage in command.STAGES)]
    # Two runs make ten minutes, and one that is told nothing fits where a command may take as long.
    assert sum(float(row[0]) for row in rows[:-1]) <= command.SECONDS == 400
    assert command.BEGINNING >= command.DEVICE.line_seconds >= 120
    assert sum(stage.seconds for stage in (command.DEVICE, *command.STAGES)) <= 600
    for stage in command.STAGES:
        assert (BENCH / f"{stage.module}.py").is_file()
    some = gpu("--plan", "--only", "mlp", "--seconds", "100").stdout
    assert [line.split()[2] for line in some.splitlines()[:-1]] == ["device", "mlp"]


def test_without_a_gpu_it_ends_with_one_line(tmp_path: Path) -> None:
    """From a checkout in which nothing is built, and whose packages are not those that are installed here."""
    checkout = tmp_path / "checkout"
    for folder in ("bench", "fusion_kernels", "python", "tests/support"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "results")
        shutil.copytree(ROOT / folder, checkout / folder, ignore=ignored)
    reason = checkout / "fusion_kernels" / "gpu.py"
    text = reason.read_text(encoding="utf-8")
    reason.write_text(text.replace("torch finds no CUDA device", "this is the copy"), encoding="utf-8")
    done = gpu("--out", str(tmp_path / "out.json"), checkout=checkout, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert done.stdout + done.stderr == "bench/gpu.py needs a GPU that the Triton backend runs on: this is the copy\n"
    assert not (tmp_path / "out.json").exists()


def test_an_older_file_is_kept_or_gone_on_with(command: ModuleType, tmp_path: Path) -> None:
    file, about = tmp_path / "out.json", {"device": "A", "kernels": "1"}
    assert command.kept_lines(file, True, about) is None
    content = {"about": about, "stages": {"mlp": {}}, "failures": {}}
    file.write_text(json.dumps(content), encoding="utf-8")
    assert command.kept_lines(file, True, about) == content
    with pytest.raises(SystemExit, match="is of another kernels: name another file with --out"):
        command.kept_lines(file, True, {**about, "kernels": "2"})
    assert command.kept_lines(file, False, about) is None
    assert not file.exists()
    assert json.loads((tmp_path / "out.json.before").read_text(encoding="utf-8")) == content
    file.write_text("{", encoding="utf-8")
    with pytest.raises(SystemExit, match="is no file of this script"):
        command.kept_lines(file, True, about)


def test_after_a_kernel_is_mended_the_lines_that_still_hold_are_kept(command: ModuleType, tmp_path: Path) -> None:
    file, about = tmp_path / "out.json", {"device": "A", "kernels": "1", "compiled sources": "a"}
    stages = {"mlp": {"x": {"ms": 3}, "y": {"failed": "errs"}}, "kmeans": {"z": {"ms": 4}}}
    failures = {"mlp": {"y": {"type": "Failed", "message": "errs"}, "v": {"type": "T", "message": "m"}}}
    taken = {"mlp": {"seconds": 1}, "kmeans": {"seconds": 2}}
    content = {"about": about, "stages": stages, "failures": failures, "taken": taken, "models": ["m"]}
    file.write_text(json.dumps(content), encoding="utf-8")
    # Kernels that are the same need no mark.
    assert command.kept_lines(file, False, about, ["mlp"]) == content
    mended = {**about, "kernels": "2"}
    with pytest.raises(SystemExit, match=r"with --out, or the stages whose lines still hold with --keep$"):
        command.kept_lines(file, True, mended)
    with pytest.raises(SystemExit, match=r"is of another device, kernels: name another file with --out$"):
        command.kept_lines(file, True, {**mended, "device": "B"}, ["mlp"])
    kept = command.kept_lines(file, False, mended, ["mlp"])
    assert (kept["taken"], kept["models"]) == ({"mlp": {"seconds": 1}}, ["m"])
    mark = {"found with": {"kernels": "1"}}
    assert kept["stages"] == {"mlp": {"x": {"ms": 3, **mark}, "y": {"failed": "errs", **mark}}}
    assert json.loads((tmp_path / "out.json.before").read_text(encoding="utf-8")) == content
    record = command.Record()
    record.adopt(kept, command.STAGES)
    assert record.failures == {"mlp": {"y": {"type": "Failed", "message": "errs", **mark}}}
    record.adopt(kept, [])
    assert record.failures["mlp"]["v"] == {"type": "T", "message": "m", **mark}
    # Mended once more: what was kept before says what it was found with at first.
    record.add("mlp", "new", {"ms": 5})
    record.note("about", mended)
    record.keep(file)
    again = command.kept_lines(file, True, {**mended, "kernels": "3", "compiled sources": "b"}, ["mlp"])
    assert again["stages"]["mlp"]["x"]["found with"] == {"kernels": "1", "compiled sources": "a"}
    assert again["stages"]["mlp"]["new"]["found with"] == {"kernels": "2", "compiled sources": "a"}


def test_a_library_that_the_bench_builds_leaves_its_own_file_usable(importable: None, tmp_path: Path) -> None:
    of_device = importlib.import_module("gpu_device")
    about = {"device": "A", "kernels": "1", "cuda library": "not there"}
    before, after = (of_device.what_lines_depend_on({**about, "cuda library": there}) for there in ("none", "built"))
    assert before == after
    assert {"device", "kernels", "compiled sources"} == set(before)


def test_a_model_that_is_none_is_refused_before_anything_runs(tmp_path: Path) -> None:
    done = gpu("--model", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == f"bench/gpu.py --model: {tmp_path} has no config.json: name the folder of a checkpoint\n"


def test_a_verdict_is_asked_for_only_where_there_is_time_for_one(
    command: ModuleType, running: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    proofs = importlib.import_module("gpu_proofs")
    monkeypatch.setattr(proofs.gpu_timing, "DEVICE", "cpu")
    limits: list[float] = []

    def check(_: Any, limit: float) -> Any:
        limits.append(limit)
        return SimpleNamespace(text="proved", why=None, cases=3, seconds=1.0)

    def asked(seconds: float) -> Any:
        return proofs._verdict(SimpleNamespace(check=check), running.Told({}, {}, time.monotonic() + seconds))

    assert asked(15.0)["skipped"].startswith("not reached: 15 s are left")
    assert asked(-3.0)["skipped"].startswith("not reached: 0 s are left")
    assert limits == []
    assert asked(30.0)["verdict"] == asked(500.0)["verdict"] == "proved"
    assert limits == pytest.approx([30.0, proofs.MOST_SECONDS], abs=2.0)
    # The line itself is given up later than that.
    line_seconds = {stage.name: stage.line_seconds for stage in command.STAGES}
    assert proofs.LEAST_SECONDS < proofs.MOST_SECONDS < line_seconds["proofs"]


# --- times, and what the documentation says ---------------------------------------------------------------------------


def test_a_call_is_timed_behind_an_emptied_cache_and_a_busy_device(
    importable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    timing, done = importlib.import_module("gpu_timing"), []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("event")

        def synchronize(self) -> None:
            done.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append(f"sleep {cycles}"))
    emptied = SimpleNamespace(zero_=lambda: done.append("empty"))
    assert timing.timed(lambda: done.append("call"), emptied) == 2.5
    assert done == ["empty", f"sleep {timing.WAIT}", "event", "call", "event", "wait"]
    # Second-level caches have 50 MiB and more.
    assert timing.CACHE_BYTES >= 128 << 20


def test_the_tests_that_the_page_names_are_there() -> None:
    page = (ROOT / "docs" / "develop" / "gpu-bring-up.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) > 10
    missing = [(file, test) for file, test in named if f"def {test}(" not in (ROOT / file).read_text(encoding="utf-8")]
    assert missing == []
