"""Proofs of kernels, with the CPU in the place of a GPU: how they fail, what is kept, who waits, and the switches."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import re
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from fusion_kernels import library, native, proof
from fusion_kernels.kmeans import ASSIGN, OPERATOR, cpu_backend, gpu_backend, host_backend
from fusion_kernels.kmeans.types import Options
from fusion_kernels.library import Backend, Operator
from fusion_kernels.proof import Proof, Verdict, cache, child
from fusion_kernels.proof import key as key_module
from fusion_kernels.proof.cases import beyond, failure, noting
from fusion_kernels.proof.key import facts, key_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    monkeypatch.delenv(proof.SWITCH, raising=False)
    proof.forget_decisions()
    yield tmp_path
    proof.forget_decisions()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is checked, in this process: starting another takes seconds."""
    found: list[str] = []

    def ask(cases: str, device: torch.device, known_as: str, limit: float) -> Verdict:
        found.append(cases)
        module, _, function = cases.partition(":")
        for case in getattr(importlib.import_module(module), function)(device):
            reason = failure(case)
            if reason is not None:
                return Verdict.of(proof.FAILED, reason, 1, 0.1, "a CPU")
        return Verdict.of("proved", None, 2, 0.1, "a CPU")

    monkeypatch.setattr(proof, "ask", ask)
    return found


def of(function: str) -> Proof:
    return Proof(f"double {function}", f"proof_cases:{function}")


def quiet(call: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


def file() -> Path:
    return cache.Cache(facts(CPU)).path


# --- verdicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("right", None),
        ("wrong", "slightly off: y errs by 4e+03 times its bound"),
        ("unwritten", "unwritten: y errs by inf times its bound"),
        ("other_bits", "racing: y has other bits the second time"),
    ],
)
def test_a_verdict_is_kept_and_not_found_again(function: str, words: str | None, asked: list[str]) -> None:
    with pytest.warns(RuntimeWarning) as told:
        assert of(function)(CPU) == words
    assert str(told[0].message) == (
        "checking GPU kernels, once: seconds, or a minute where they are not compiled yet; FUSION_KERNELS_GPU=off skips"
    )
    assert [str(w.message) for w in told[1:]] == (
        [] if words is None else [f"GPU kernels are not used: double {function}: {words}"]
    )
    proof.forget_decisions()  # as in the next process
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert of(function)(CPU) == of(function)(CPU) == words
        assert of(function).reason(CPU) == words
    assert len(asked) == 1
    whole = json.loads(file().read_text(encoding="utf-8"))
    assert whole["about"] == facts(CPU)
    assert whole["proofs"][f"double {function}"]["why"] == words
    state = of(function).state(CPU)
    assert state.startswith("proved 2" if words is None else "failed 2")
    assert state.endswith("on a CPU in 0 s" if words is None else words)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "outcome", "words", "cases"),
    [
        ("right", "proved", None, 2),
        ("raising", "failed", "illegal: RuntimeError: an illegal memory access was encountered", 1),
    ],
)
def test_cases_run_in_a_process_of_their_own(function: str, outcome: str, words: str | None, cases: int) -> None:
    verdict = child.ask(f"proof_cases:{function}", CPU, key_of(facts(CPU)), 100.0)
    assert (verdict.outcome, verdict.why, verdict.cases, verdict.on) == (outcome, words, cases, facts(CPU)["device"])


@pytest.mark.parametrize(
    ("said", "ending", "outcome", "words", "cases"),
    [
        ([{"key": "k"}, {"begin": "a"}], "time.sleep(600)", "failed", "case 'a' did not end within 2 s", 0),
        ([{"key": "k"}], "time.sleep(600)", "unknown", "the preparation did not end within 2 s", 0),
        (
            [{"key": "k"}, {"begin": "a"}, {"failure": None}, {"begin": "b"}],
            "os.abort()",
            "failed",
            "case 'b' ended its process (status -6): nothing was said",
            1,
        ),
        ([{"key": "k"}, {"begin": "a"}], "sys.exit('CUDA out of memory')", "unknown", "case 'a' ended its process", 0),
        ([{"key": "k"}], "sys.exit('no module')", "unknown", "the preparation ended its process (status 1): no", 0),
        ([], "sys.exit('no torch')", "unknown", "the preparation ended its process (status 1): no torch", 0),
        ([{"key": "k"}, {"failure": "out of memory", "passes": True}], "0", "unknown", "out of memory", 1),
        ([{"key": "k"}, {"failure": "y is off", "passes": False}], "0", "failed", "y is off", 1),
        ([{"key": "k"}, {"end": True}], "0", "failed", "there are no cases", 0),
        ([{"key": "other"}, {"failure": None}, {"end": True}], "0", "unknown", "another process finds another", 0),
    ],
)
def test_what_the_other_process_comes_to(
    said: list[dict[str, Any]], ending: str, outcome: str, words: str, cases: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "".join(json.dumps(line) + "\n" for line in said)
    script = f"import os, sys, time; print({lines!r}, end='', flush=True); {ending}"
    monkeypatch.setattr(child, "_START", script.replace("{", "{{").replace("}", "}}"))
    verdict = child.ask("proof_cases:right", CPU, "k", 2.0)
    assert (verdict.outcome, verdict.cases) == (outcome, cases)
    assert str(verdict.why).startswith(words)


def test_without_time_for_a_case_nothing_speaks_against_kernels() -> None:
    verdict = child.ask("proof_cases:right", CPU, key_of(facts(CPU)), 0.2)
    assert (verdict.outcome, verdict.why) == ("unknown", "the preparation did not end within 0.2 s")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("wrong", "slightly off: y errs"),
        ("raising", "illegal: RuntimeError: an illegal memory access was encountered"),
        ("full", "large: OutOfMemoryError: CUDA out of memory."),
    ],
)
def test_a_failure_is_said_line_by_line(function: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    child.main((f"proof_cases:{function}", "cpu"))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == {"key": key_of(facts(CPU))}
    assert lines[-1]["failure"].startswith(words)
    assert lines[-1]["passes"] == (function == "full")


def test_what_could_not_be_judged_is_tried_again_later(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "ask", lambda *_: Verdict.of("unknown", "out of memory"))
    assert quiet(lambda: of("right")(CPU)) == "out of memory"
    proof.forget_decisions()
    # The ranks of one job that ask a little later decide alike.
    assert of("right")(CPU) == "out of memory"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 7200)
    assert of("right")(CPU) == "out of memory"  # this process goes on as it began
    proof.forget_decisions()
    monkeypatch.setattr(proof, "ask", lambda *_: Verdict.of("proved", None))
    assert quiet(lambda: of("right")(CPU)) is None


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda text: text[:40], "cannot be read"),
        (lambda text: "\xff\x00", "cannot be read"),
        (lambda text: "[]", "is of another version"),
        (lambda text: text.replace('"format": 1', '"format": 0'), "is of another version"),
        (lambda text: text.replace('"device": "', '"device": "another '), "is about another machine or other kernels"),
        (lambda text: text.replace('"proofs": {', '"proof": {'), "is incomplete"),
    ],
)
def test_a_file_that_is_not_to_be_believed(spoil: Callable[[str], str], words: str, asked: list[str]) -> None:
    quiet(lambda: of("right")(CPU))
    file().write_text(spoil(file().read_text(encoding="utf-8")), encoding="utf-8")
    proof.forget_decisions()
    assert proof.described(CPU)["state"].startswith(f"not believed: {words}")
    with pytest.warns(RuntimeWarning) as told:
        assert of("right")(CPU) is None
    assert re.search(f"{words}.*: it is not believed, and written anew", " ".join(str(w.message) for w in told))
    assert len(asked) == 2
    assert proof.described(CPU)["state"] == "1 proofs, 0 measured"


@pytest.mark.parametrize("entry", [{}, None, {"outcome": "proved"}, {"outcome": "proved", "why": "wrong"}])
def test_an_entry_that_is_no_verdict(entry: Any, asked: list[str]) -> None:
    quiet(lambda: of("right")(CPU))
    whole = json.loads(file().read_text(encoding="utf-8"))
    found = whole["proofs"]["double right"]
    whole["proofs"]["double right"] = {**found, **entry} if entry and len(entry) == 2 else entry
    file().write_text(json.dumps(whole), encoding="utf-8")
    proof.forget_decisions()
    assert quiet(lambda: of("right")(CPU)) is None
    assert len(asked) == 2


def test_where_nothing_can_be_written(asked: list[str], folder: Path) -> None:
    (folder / "gpu").write_text("a file", encoding="utf-8")
    with pytest.warns(RuntimeWarning) as told:
        assert of("right")(CPU) is None
    assert re.search(
        "is forgotten when this process ends: .* cannot be written", " ".join(str(w.message) for w in told)
    )
    assert of("right")(CPU) is None
    assert len(asked) == 1


def test_the_key_is_of_everything_that_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    about = facts(CPU)
    names = {"project", "kernels", "cuda library", "torch", "triton", "ptxas", "TRITON_DEFAULT_FP_FUSION", "device"}
    assert about.keys() >= names
    assert len({key_of(about), *(key_of({**about, name: "another"}) for name in about)}) == len(about) + 1
    (tmp_path / "gpu.py").write_text("1", encoding="utf-8")
    monkeypatch.setattr(key_module, "PACKAGE", tmp_path)

    def found() -> tuple[str, str]:
        about = facts.__wrapped__(CPU)
        return about["kernels"], about["cuda library"]

    first = found()
    (tmp_path / "gpu.py").write_text("2", encoding="utf-8")
    second = found()
    assert second[0] != first[0]
    assert second[1] == first[1]
    # A library that is built later is another fact, and another key.
    (tmp_path / "_cuda.abi3.so").write_bytes(b"1")
    third = found()
    assert third[0] == second[0]
    assert third[1] != second[1]


def test_of_two_processes_one_checks_and_the_other_waits(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUNTED", str(tmp_path / "counted"))
    context = multiprocessing.get_context("fork")
    found = context.SimpleQueue()
    started = [context.Process(target=lambda: found.put(quiet(lambda: of("counted")(CPU)))) for _ in range(2)]
    for process in started:
        process.start()
    assert [found.get() for _ in started] == [None, None]
    for process in started:
        process.join()
    assert (tmp_path / "counted").read_text(encoding="utf-8") == "run\n"


def test_who_waits_too_long_says_so(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "PATIENCE", 0.05)
    file().parent.mkdir()
    with FileLock(f"{file()}.lock"):
        assert str(of("right")(CPU)).startswith("another process has been checking for 0 s")
    assert not asked


# --- when ------------------------------------------------------------------------------------------------------------


def test_nothing_is_checked_while_tracing_or_recording(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert of("right")(CPU) == proof.NOT_YET
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert of("right")(CPU) == proof.NOT_YET
    assert not asked


def test_a_verdict_counts_while_recording(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    quiet(lambda: of("right")(CPU))
    quiet(lambda: of("wrong")(CPU))
    proof.forget_decisions()
    monkeypatch.setattr(proof, "may_stop_here", lambda: False)
    assert of("right")(CPU) is None
    assert "slightly off" in str(of("wrong")(CPU))


@pytest.mark.parametrize(
    ("value", "found", "state", "checks"),
    [
        ("auto", None, "proved 2", 1),
        ("", None, "proved 2", 1),
        ("proved", None, "proved 2", 1),
        ("trust", None, "taken on trust: FUSION_KERNELS_GPU=trust", 0),
        ("off", "FUSION_KERNELS_GPU=off", "not asked for: FUSION_KERNELS_GPU=off", 0),
    ],
)
def test_switches(
    value: str, found: str | None, state: str, checks: int, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(proof.SWITCH, value)
    assert quiet(lambda: of("right")(CPU)) == found
    assert of("right").state(CPU).startswith(state)
    assert len(asked) == checks


def test_an_unknown_switch_names_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(proof.SWITCH, "on")
    for ask in (of("right"), of("right").state, of("right").reason):
        with pytest.raises(ValueError, match=r"^unknown FUSION_KERNELS_GPU 'on': use one of auto, off, proved, trust$"):
            ask(CPU)


# --- dispatch --------------------------------------------------------------------------------------------------------


def _proved_by(function: str) -> Operator:
    op = Operator("double", "(Tensor x) -> Tensor")
    op.register(Backend("triton", lambda x: x * 2, ("cpu",), proof=of(function)))
    op.register(Backend("reference", lambda x: x + x, ("cpu",)))
    return op


def test_auto_passes_over_what_is_not_proved(asked: list[str]) -> None:
    assert quiet(lambda: _proved_by("right").select("auto", CPU).name) == "triton"
    assert quiet(lambda: _proved_by("wrong").select("auto", CPU).name) == "reference"
    assert len(asked) == 2
    # By name as ever, without a proof.
    assert _proved_by("other_bits").select("triton", CPU).name == "triton"
    assert len(asked) == 2


def test_backends_says_what_is_proved(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    op = _proved_by("wrong")
    op.backends = [Backend(b.name, b.function, ("cpu", "cuda"), proof=b.proof) for b in op.backends]
    monkeypatch.setattr(library, "_OPERATORS", {"double": op})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(proof, "indexed", lambda device: CPU)
    row = library.backends()["double"]
    assert row == {"cpu": "reference", "cuda": "reference", "triton proof": proof.NOT_YET}
    assert not asked
    quiet(lambda: library.proofs(torch.device("cuda"))["double wrong"](CPU))
    row = library.backends()["double"]
    assert row["cuda"] == "reference"
    assert row["triton proof"].endswith(": slightly off: y errs by 4e+03 times its bound")


def test_kmeans_on_a_gpu(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton where it is proved, else the compiled kernels of the CPU, else the reference."""
    gpu = torch.device("cuda", 0)
    there: dict[str, str | None] = {"proof": None, "triton": None}
    monkeypatch.setattr(Proof, "__call__", lambda self, device: there["proof"])
    for op in (OPERATOR, ASSIGN):
        changed = [
            Backend(b.name, b.function, b.device_types, (lambda _: there["triton"]), b.takes, b.proof)
            if b.name == "triton"
            else b
            for b in op.backends
        ]
        monkeypatch.setattr(op, "backends", changed)
    assert OPERATOR.select("auto", gpu).name == ASSIGN.select("auto", gpu).name == "triton"
    for obstacle in there:
        monkeypatch.setitem(there, obstacle, "it is wrong")
        monkeypatch.setattr("fusion_kernels.native.UNAVAILABLE", None)
        assert OPERATOR.select("auto", gpu).name == "host"
        monkeypatch.setattr("fusion_kernels.native.UNAVAILABLE", "it is not built")
        assert OPERATOR.select("auto", gpu).name == ASSIGN.select("auto", gpu).name == "reference"
        monkeypatch.setitem(there, obstacle, None)
    assert {b.name for b in OPERATOR.backends if b.proof is not None} == {"triton"}
    assert gpu_backend.why_not(CPU) is not None


@pytest.mark.skipif(native.UNAVAILABLE is not None, reason="the compiled library is not there")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_go_to_the_host_and_results_come_back(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device that only counts what goes there and back."""
    moved: list[str] = []
    original_cpu, original_to = torch.Tensor.cpu, torch.Tensor.to

    def cpu(t: torch.Tensor) -> torch.Tensor:
        moved.append("up")
        return original_cpu(t)

    def to(t: torch.Tensor, *where: Any, **options: Any) -> torch.Tensor:
        moved.extend(["down"] * (where == (CPU,)))
        return original_to(t, *where, **options)

    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, 3, generator=g).to(dtype)
    weight, labels = torch.rand(2, 40, generator=g).to(dtype), torch.randint(5, (2, 40), generator=g)
    for start in (None, x[:, :5], labels):
        expected = cpu_backend.kmeans(x, weight, start, Options(5, seed=1))
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "cpu", cpu)
            patch.setattr(torch.Tensor, "to", to)
            found = host_backend.kmeans(x, weight, start, Options(5, seed=1))
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert found[1].dtype == dtype
        assert (moved.count("up"), moved.count("down") >= 6) == (2 if start is None else 3, True)
        moved.clear()


def test_errors_are_noted_as_shares_of_their_bounds() -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    with noting() as shares:
        assert beyond("y", one, zero, 2.0) is None
        assert beyond("y", 0.5 * one, zero, 2.0) is None
        assert beyond("x", one, zero, 0.25) == "x errs by 4 times its bound"
        with noting() as inner:
            beyond("x", one, zero, 0.5)
    beyond("x", one, zero, 0.01)
    assert (shares, inner) == ({"y": 0.5, "x": 4.0}, {"x": 2.0})
