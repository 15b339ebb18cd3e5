"""`mlp-fusion gpu check | tune | forget` and what `env` says, with the CPU in the place of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from commands import Run
from fusion_kernels import gpu, library, proof
from fusion_kernels.experts.operators import EXPERTS
from fusion_kernels.mlp.operators import MLP
from fusion_kernels.proof import Proof, Verdict, cache
from mlp_fusion.verbs import env
from mlp_fusion.verbs import gpu as verb

CPU = torch.device("cpu")
SHAPE = ("--tokens", "1100", "--inputs", "16", "--neurons", "8")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(proof.SWITCH, raising=False)
    for operator in (MLP, EXPERTS):
        monkeypatch.setattr(operator.choice, "clock", lambda works, _: dict.fromkeys(works, 1.0))
    proof.forget_decisions()
    yield tmp_path
    proof.forget_decisions()
    for operator in (MLP, EXPERTS):
        operator.choice.forget()


@pytest.fixture
def _one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "devices", lambda: [CPU])


@pytest.mark.usefixtures("_one_device")
@pytest.mark.parametrize(("why", "code"), [(None, 0), ("Gram matrix: errs by 7 times its bound", 1)])
def test_check(why: str | None, code: int, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Proof("kmeans triton", "nothing:here")
    monkeypatch.setattr(library, "proofs", lambda device: {kernels.name: kernels})
    outcome = "proved" if why is None else "failed"
    monkeypatch.setattr(proof, "ask", lambda *_: Verdict.of(outcome, why, 9, 8.2, "a GPU"))
    done = run("gpu", "check", "--json")
    assert (done.code, done.json["passed"]) == (code, code == 0)
    (row,) = done.json["rows"]
    assert (row["device"], row["kernels"]) == ("cpu", "kmeans triton")
    assert row["verdict"].startswith("proved 2" if why is None else "failed 2")
    assert row["verdict"].endswith("on a GPU in 8 s" if why is None else why)
    assert kernels(CPU) == why  # kept, and gone by
    assert "kmeans triton" in run("gpu", "check").out


@pytest.mark.usefixtures("_one_device")
def test_check_without_a_place_for_verdicts(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "cache").write_text("a file", encoding="utf-8")
    monkeypatch.setattr(library, "proofs", lambda device: {"a": Proof("a", "nothing:here")})
    done = run("gpu", "check")
    assert done.code == 2
    assert "cannot be written" in done.error
    assert "MLP_FUSION_CACHE says where" in done.error


@pytest.mark.usefixtures("_one_device")
@pytest.mark.parametrize("gated", [False, True])
def test_tune(gated: bool, run: Run) -> None:
    done = run("gpu", "tune", *SHAPE, "--activation", "silu", *(["--gated"] if gated else []), "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["rows"] == [{"device": "cpu", "fastest": "torch", "ms": {"torch": 1.0}, "refused": {}}]
    kept = cache.Cache(proof.facts(CPU)).section("measured")
    assert [*kept] == [f"mlp, bfloat16, d 16 h 8 out 16, {'gated ' if gated else ''}silu, trained, 1024 tokens"]


@pytest.mark.usefixtures("_one_device")
def test_tune_of_experts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.Tensor, ...]] = []
    loop = EXPERTS.choice._pairs("loop")
    pair = (lambda *given: seen.append(given[:3]) or loop[0](*given), loop[1])
    monkeypatch.setattr(EXPERTS.choice, "_pairs", {"loop": pair}.__getitem__)
    done = run("gpu", "tune", *SHAPE, "--activation", "silu", "--gated", "--experts", "5", "--top-k", "2", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["rows"] == [{"device": "cpu", "fastest": "loop", "ms": {"loop": 1.0}, "refused": {}}]
    # Every token goes to two experts, which have about as many rows each.
    ((x, order, ends),) = seen
    assert x.shape == (1100, 16)
    assert order.sort().values.equal(torch.arange(2200))
    assert int(ends[-1]) == 2200
    assert 350 < int(torch.cat([ends[:1], ends.diff()]).min()) <= 440
    kept = cache.Cache(proof.facts(CPU)).section("measured")
    assert [*kept] == ["experts 5, bfloat16, d 16 h 8 out 16, gated silu, trained, 2048 tokens"]


@pytest.mark.parametrize("wrong", [("--tokens", "0"), ("--experts", "0"), ("--experts", "-2"), ("--top-k", "0")])
def test_tune_refuses_what_is_no_count(wrong: tuple[str, str], run: Run) -> None:
    done = run("gpu", "tune", *SHAPE, *wrong)
    words = "mlp-fusion: --tokens, --inputs, --neurons, --experts and --top-k are counts: give at least 1"
    assert (done.code, done.error) == (2, words)


def test_tune_names_what_does_not_fit(run: Run) -> None:
    for more in (("--top-k", "2"), ("--experts", "1", "--top-k", "2")):
        done = run("gpu", "tune", *SHAPE, *more)
        words = "mlp-fusion: --top-k 2 are more experts than there are: give --experts, at least as many"
        assert (done.code, done.error) == (2, words)
    done = run("gpu", "tune", *SHAPE, "--activation", "tanh")
    assert (done.code, "unknown --activation 'tanh': use one of gelu, " in done.error) == (2, True)


@pytest.mark.usefixtures("_one_device")
def test_forget(run: Run, folder: Path) -> None:
    run("gpu", "tune", *SHAPE)
    (row,) = run("gpu", "forget", "--json").json["rows"]
    assert Path(row["removed"]).parent == folder / "cache" / "gpu"
    assert not Path(row["removed"]).exists()
    assert run("gpu", "forget").out == "nothing is there\n"


def test_where_there_is_no_gpu(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(gpu, "why_not", lambda device=None: "torch finds no CUDA device")
    for command in (["check"], ["tune", *SHAPE]):
        done = run("gpu", *command)
        words = "mlp-fusion: there is no GPU that the kernels run on: torch finds no CUDA device"
        assert (done.code, done.error) == (2, words)


@pytest.mark.usefixtures("_one_device")
def test_env_says_which_file_and_what_is_in_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def states() -> list[dict[str, str]]:
        with monkeypatch.context() as patch:
            patch.setattr(gpu, "no_gpu", lambda device=None: None)
            patch.setattr(proof, "indexed", lambda device: CPU)
            patch.setattr(torch.cuda, "device_count", lambda: 1)
            return verb.states()

    (state,) = states()
    assert state == {"device": "cuda:0", "switch": "auto", "file": state["file"], "state": "not there yet"}
    run("gpu", "tune", *SHAPE)
    assert states()[0]["state"] == "0 proofs, 1 measured"
    whole = {**env.environment(), "gpu_kernels": [state]}
    monkeypatch.setattr(env, "environment", lambda: whole)
    line = next(line for line in run("env").out.splitlines() if line.startswith("GPU kernels"))
    assert line.split(maxsplit=2)[2] == f"device: cuda:0, switch: auto, file: {state['file']}, state: not there yet"
