"""Streamed runs whose widths a budget decides: those of a run in memory, and its bits."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from streams import StoppedError, files, with_tokenizer
from transformers import AutoModelForCausalLM

import checkpoints as ck
import mlp_fusion
from families import tiny_model
from mlp_fusion import InputError
from mlp_fusion.calibration import sensitivity
from mlp_fusion.calibration.sensitivity import output_gradients
from mlp_fusion.reducing import every
from mlp_fusion.reducing.widths import allocate_widths
from mlp_fusion.settings import CompressSettings, make
from mlp_fusion.streaming import sensing, surveying
from mlp_fusion.streaming.surveying import Survey
from mlp_fusion.verbs.compress import rehearse

pytestmark = pytest.mark.slow

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "over", "big"]
AUTO: dict[str, Any] = {"width": "auto", "budget": 0.5, "stream": True}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    drawn = torch.randint(len(WORDS), (120, 12), generator=torch.Generator().manual_seed(0)).tolist()
    file = tmp_path / "text.txt"
    file.write_text("\n".join(" ".join(WORDS[n] for n in line) for line in drawn))
    return file


def uneven(folder: Path) -> Path:
    """A Llama shape of which one layer's FFN does nothing, and another one's much."""
    model: Any = tiny_model("llama", task="CausalLM", num_hidden_layers=4, intermediate_size=256)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-4)
        model.model.layers[2].mlp.down_proj.weight.mul_(3)
    model.save_pretrained(folder)
    ck.add_tokenizer(folder, pad_token="<pad>")
    return folder


def stop_at(stage: str, out: Path) -> Callable[[int, int], None]:
    """A progress that stops a run: while gradients are taken, widths looked for, or when one or two FFNs are done."""
    journal = out.with_name(f".{out.name}.journal")

    def progress(done: int, total: int) -> None:
        lines = journal.read_text().splitlines() if journal.exists() else []
        at = {"gradients": done > 0 and not lines, "losses": 2 * done > total and not lines}
        if at.get(stage) or {"first": 2, "second": 3}.get(stage) == len(lines):
            raise StoppedError

    return progress


@pytest.mark.parametrize("name", ["uneven", "Phi3Config", "BartConfig", "T5Config"])
def test_widths_and_bits_are_those_of_a_run_in_memory(
    name: str, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves: list[Any] = []

    def noted(found: Any, stacks: Any, budget: float) -> list[int]:
        curves.append(found)
        return allocate_widths(found, stacks, budget)

    for module in (every, surveying):
        monkeypatch.setattr(module, "allocate_widths", noted)
    for module in (every, surveying, sensing, sensitivity):
        monkeypatch.setattr(module, "SENSED_TOKENS", 200)  # fewer than there are
    source = uneven(tmp_path / "source") if name == "uneven" else with_tokenizer(name, tmp_path / "source")
    reports = {
        stream: mlp_fusion.compress(source, tmp_path / str(stream), calibration=text, **{**AUTO, "stream": stream})
        for stream in (False, True)
    }
    assert curves[0] == curves[1]
    widths = {stream: {r.layer: r.neurons_after for r in report.rows} for stream, report in reports.items()}
    whole = {r.layer: r.neurons_before for r in reports[False].rows}
    # Of a run from disk to disk, what keeps its width has no row.
    assert {**whole, **widths[True]} == widths[False]
    if name == "uneven":
        assert len(set(widths[True].values())) > 1
        assert widths[False][1] == min(widths[False].values()) < widths[False][2]
    memory, streamed = ck.tensors(tmp_path / "False"), ck.tensors(tmp_path / "True")
    assert memory.keys() == streamed.keys()
    assert all(torch.equal(memory[key], streamed[key]) for key in memory)
    assert reports[True].parameters_after == reports[False].parameters_after
    assert reports[True].settings.budget == 0.5
    assert mlp_fusion.verify(tmp_path / "True", against=source).passed


def test_it_loads_and_runs(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    report = mlp_fusion.compress(uneven(tmp_path / "source"), out, calibration=text, **AUTO)
    model = AutoModelForCausalLM.from_pretrained(out)
    found = {n: layer.mlp.down_proj.in_features for n, layer in enumerate(model.model.layers)}
    assert {row.layer: row.neurons_after for row in report.rows}.items() <= found.items()
    assert model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


@pytest.mark.parametrize(("stage", "surveyed"), [("gradients", 2), ("losses", 2), ("first", 1), ("second", 1)])
def test_a_run_goes_on_with_the_widths_that_it_has_found(
    stage: str, surveyed: int, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = uneven(tmp_path / "source")
    options: dict[str, Any] = {**AUTO, "calibration": text, "tune_steps": 2}
    mlp_fusion.compress(source, tmp_path / "whole", **options)
    surveys: list[int] = []
    widths = Survey.widths

    def counted(self: Survey, *given: Any) -> dict[int, int]:
        surveys.append(1)
        return widths(self, *given)

    monkeypatch.setattr(Survey, "widths", counted)
    with pytest.raises(StoppedError):
        mlp_fusion.compress(source, tmp_path / "out", progress=stop_at(stage, tmp_path / "out"), **options)
    mlp_fusion.compress(source, tmp_path / "out", resume=True, **options)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert len(surveys) == surveyed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source", "text.txt", "whole"]


def test_gradients_are_taken_once(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def counted(*given: Any, **options: Any) -> None:
        taken.append(1)
        output_gradients(*given, **options)

    monkeypatch.setattr(sensing, "output_gradients", counted)
    mlp_fusion.compress(uneven(tmp_path / "source"), tmp_path / "out", calibration=text, **AUTO)
    assert len(taken) == 1


def test_a_full_disk_is_said_to_be_one(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_options: Any) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(sensing, "save_file", refuse)
    source = uneven(tmp_path / "source")
    with pytest.raises(InputError, match=r"No space left on device: once that is mended, start again \(gr"):
        mlp_fusion.compress(source, tmp_path / "out", calibration=text, **AUTO)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "text.txt"]


def test_another_budget_is_another_run(tmp_path: Path, text: Path) -> None:
    source, out = uneven(tmp_path / "source"), tmp_path / "out"
    options: dict[str, Any] = {**AUTO, "calibration": text, "tune_steps": 2}
    fixed: dict[str, Any] = {"width": 128, "budget": None}
    for first, then in (({}, {"budget": 0.25}), (fixed, {}), ({"layers": "first:2"}, {}), ({}, {"layers": "first:2"})):
        with pytest.raises(StoppedError):
            mlp_fusion.compress(source, out, force=True, progress=stop_at("first", out), **{**options, **first})
        with pytest.raises(InputError, match="the unfinished run had another recipe"):
            mlp_fusion.compress(source, out, resume=True, **{**options, **then})


def test_another_source_is_another_run(tmp_path: Path, text: Path) -> None:
    options: dict[str, Any] = {**AUTO, "calibration": text, "tune_steps": 2}
    for name, layers in (("shorter", 3), ("longer", 6)):
        tiny_model("llama", task="CausalLM", num_hidden_layers=layers, intermediate_size=256).save_pretrained(
            tmp_path / name
        )
        ck.add_tokenizer(tmp_path / name, pad_token="<pad>")
    out = tmp_path / "out"
    with pytest.raises(StoppedError):
        mlp_fusion.compress(uneven(tmp_path / "source"), out, progress=stop_at("first", out), **options)
    for name in ("shorter", "longer"):
        with pytest.raises(InputError, match="the unfinished run had another source"):
            mlp_fusion.compress(tmp_path / name, out, resume=True, **options)


def test_temporary_files_are_made_for_a_survey_alone_and_go(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, place = uneven(tmp_path / "source"), tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    seen: list[bool] = []
    options: dict[str, Any] = {**AUTO, "calibration": text, "tune_steps": 2}

    def stop(_done: int, _total: int) -> None:
        seen.append(bool(list(place.iterdir())))
        if seen[-1]:
            raise StoppedError

    with pytest.raises(StoppedError):
        mlp_fusion.compress(source, tmp_path / "out", progress=stop, **options)
    assert list(place.iterdir()) == []
    mlp_fusion.compress(source, tmp_path / "out", **options)
    assert list(place.iterdir()) == []
    place.rmdir()
    with pytest.raises(InputError, match=r"no folder for temporary files .*: name one by TMPDIR"):
        mlp_fusion.compress(source, tmp_path / "auto", **options)
    mlp_fusion.compress(source, tmp_path / "fixed", 128, stream=True, calibration=text)


@pytest.mark.parametrize("name", ["Qwen3MoeConfig", "SwitchTransformersConfig"], ids=["stacked", "modules"])
def test_experts_get_no_widths_of_their_own(name: str, tmp_path: Path, text: Path) -> None:
    source = with_tokenizer(name, tmp_path / "source")
    asked = make(CompressSettings, {**AUTO, "calibration": text}, "compress")
    with pytest.raises(InputError, match=r"experts\S*: width auto in a streamed run is for dense FFNs"):
        rehearse(source, tmp_path / "out", asked)
    assert rehearse(source, tmp_path / "out", dataclasses.replace(asked, stream=None)).ffns


def test_too_small_a_budget_is_refused_before_the_work(tmp_path: Path, text: Path) -> None:
    source = uneven(tmp_path / "source")
    least = r"budget is too small: the narrowest widths take 0\.125 of the parameters"
    for stream in (True, None):
        asked = make(CompressSettings, {**AUTO, "budget": 0.12, "calibration": text, "stream": stream}, "compress")
        with pytest.raises(InputError, match=least):
            rehearse(source, tmp_path / "out", asked)
    with pytest.raises(InputError, match=least):
        mlp_fusion.fuse(AutoModelForCausalLM.from_pretrained(source), "auto", budget=0.12, calibration=never())
    assert rehearse(source, tmp_path / "out", dataclasses.replace(asked, budget=0.125)).ffns


def never() -> Iterator[Any]:
    """Text that nobody is to read."""
    yield pytest.fail("the text was read")


def test_it_needs_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="width auto needs calibration text"):
        mlp_fusion.compress(ck.save_tiny(tmp_path / "source"), tmp_path / "out", **AUTO)
