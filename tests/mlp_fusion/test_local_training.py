"""Local tuning of reduced FFNs on calibration rows, and its way through `fuse` and the command line."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import checkpoints as ck
from bundles import random_bundle, statistics_of
from families import FAMILIES, tiny_model, token_batch
from mlp_fusion import FusionReport, InputError, compress, fuse
from mlp_fusion.calibration import FFNStatistics, refit, train_locally
from mlp_fusion.cli import cli
from mlp_fusion.measure import relative_error
from mlp_fusion.methods import get_method
from mlp_fusion.neurons import NeuronBundle
from mlp_fusion.reducing.pipeline import Recipe, reduce_ffns

pytestmark = pytest.mark.slow

TEXT = [token_batch(seed=n, batch=6, length=12) for n in range(8)]


def _rows(count: int, d: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(count, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _problem(seed: int = 0, rows: int = 300, **layout: Any) -> tuple[NeuronBundle, NeuronBundle, FFNStatistics]:
    """An FFN of 40 neurons, 8 fused ones refitted to its rows, and its statistics."""
    original = random_bundle(width=40, seed=seed, **layout)
    known = statistics_of(original, _rows(rows, seed=seed))
    reduced = original.reduce(torch.arange(40).unsqueeze(0) % 8)
    return original, refit(reduced, known).bundle, known


def _error(bundle: NeuronBundle, known: FFNStatistics) -> float:
    weights = known.row_weights().unsqueeze(1)
    return relative_error(bundle.forward(known.x)[0] * weights, known.y * weights)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", ["scaled", "split"])
def test_tuning_lowers_the_error_and_keeps_the_scale(gated: bool, bias: bool, form: str) -> None:
    original, reduced, known = _problem(gated=gated, bias=bias)
    found = train_locally(reduced.parameterized(form), [known], steps=150, seed=0)
    assert float(found.before[0]) == pytest.approx(_error(reduced, known), rel=1e-9)
    assert float(found.after[0]) == pytest.approx(_error(found.bundle, known), rel=1e-9)
    assert found.after[0] < 0.9 * found.before[0]
    other = statistics_of(original, _rows(300, seed=99))
    assert _error(found.bundle, other) < 0.9 * _error(reduced, other), "on rows that were not seen, too"
    torch.testing.assert_close(found.bundle.scale, reduced.scale)
    assert found.bundle.scale_exponent == 0.0
    for name in ("w_in", "w_gate", "b_in", "b_gate", "w_out", "b_out"):
        before, after = getattr(reduced, name), getattr(found.bundle, name)
        assert (before is None) == (after is None)
        assert before is None or not torch.allclose(before, after), name


def test_what_does_not_get_better_comes_back_to_the_bit() -> None:
    """Outputs that the FFN has already: training can only lead away from them."""
    _, reduced, known = _problem()
    exact = dataclasses.replace(known, y=reduced.forward(known.x)[0])
    found = train_locally(reduced, [exact], steps=60, seed=0)
    assert float(found.before[0]) < float(found.after[0])
    for name in ("w_in", "b_in", "w_out", "b_out", "scale"):
        assert torch.equal(getattr(found.bundle, name), getattr(reduced, name))


def test_few_rows_are_not_trained_on() -> None:
    """Fewer than two per input; of those that are enough, every one counts."""
    original = random_bundle(width=40)
    reduced = original.reduce(torch.arange(40).unsqueeze(0) % 8)
    few, enough = (statistics_of(original, _rows(count)) for count in (9, 10))
    found = train_locally(reduced, [few], steps=20, seed=0)
    assert torch.equal(found.bundle.w_in, reduced.canonical().w_in)
    assert math.isnan(float(found.after[0]))
    tuned = train_locally(reduced, [enough], steps=20, seed=0)
    assert not torch.equal(tuned.bundle.w_in, reduced.canonical().w_in)
    for row in range(10):
        y = enough.y.clone()
        y[row] *= 1.01
        other = train_locally(reduced, [dataclasses.replace(enough, y=y)], steps=20, seed=0)
        assert not torch.equal(other.bundle.w_in, tuned.bundle.w_in)


def test_same_seed_same_bits() -> None:
    _, reduced, known = _problem(rows=1500)
    runs = [train_locally(reduced, [known], steps=20, seed=seed).bundle for seed in (3, 3, 4)]
    assert torch.equal(runs[0].w_in, runs[1].w_in)
    assert torch.equal(runs[0].w_out, runs[1].w_out)
    assert not torch.equal(runs[0].w_in, runs[2].w_in)


@pytest.mark.parametrize("gated", [False, True])
def test_side_by_side_is_one_by_one(gated: bool) -> None:
    """Also where one of them, whose outputs are a thousand times as large, has other units."""
    problems = [_problem(seed, gated=gated) for seed in range(3)]
    reduced = [p[1] for p in problems]
    known = [p[2] for p in problems]
    reduced[1] = dataclasses.replace(reduced[1], w_out=reduced[1].w_out * 1e3, b_out=reduced[1].b_out * 1e3)
    known[1] = dataclasses.replace(known[1], y=known[1].y * 1e3)
    together = train_locally(NeuronBundle.stack(reduced), known, steps=40, seed=0)
    for n in range(3):
        alone = train_locally(reduced[n], [known[n]], steps=40, seed=0)
        torch.testing.assert_close(together.bundle.select(n).w_in, alone.bundle.w_in)
        torch.testing.assert_close(together.bundle.select(n).w_out, alone.bundle.w_out)
        torch.testing.assert_close(together.after[n : n + 1], alone.after)


def test_silent_neurons_stay_silent() -> None:
    _, reduced, known = _problem()
    assert reduced.scale is not None
    scale = reduced.scale.clone()
    scale[0, 3] = 0.0
    silent = dataclasses.replace(reduced, scale=scale)
    found = train_locally(silent, [known], steps=40, seed=0)
    assert found.after[0] < found.before[0]
    assert float(found.bundle.scale[0, 3]) == 0.0  # type: ignore[index]
    torch.testing.assert_close(found.bundle.w_in[0, 3], silent.w_in[0, 3])
    folded = found.bundle.parameterized("folded")
    assert float(folded.w_out[0, 3].abs().max()) == 0.0


def test_degenerate_problems_come_back_as_they_are() -> None:
    _, reduced, known = _problem()
    few = statistics_of(random_bundle(width=40), _rows(3), sequences=1)
    for found in (train_locally(reduced, [known], steps=0, seed=0), train_locally(reduced, [few], steps=9, seed=0)):
        assert torch.equal(found.bundle.w_in, reduced.w_in)
        assert math.isnan(float(found.before[0]))
    zero = dataclasses.replace(
        reduced, **{n: torch.zeros_like(getattr(reduced, n)) for n in ("w_in", "b_in", "w_out", "b_out")}
    )
    dead = train_locally(zero, [dataclasses.replace(known, y=torch.zeros_like(known.y))], steps=9, seed=0)
    assert float(dead.bundle.w_out.abs().max()) == 0.0
    with pytest.raises(ValueError, match="give 0 or more"):
        train_locally(reduced, [known], steps=-1, seed=0)
    for wrong in ([], [known, known]):
        with pytest.raises(ValueError, match="as many statistics"):
            train_locally(reduced, wrong, steps=1, seed=0)
    with pytest.raises(ValueError, match="as many statistics"):
        train_locally(NeuronBundle.stack([reduced, reduced]), [known, few], steps=1, seed=0)


def test_the_pipeline_keeps_what_is_better_and_matches_the_kernel_afterwards() -> None:
    originals = [random_bundle(width=40, seed=seed, dtype=torch.float32) for seed in range(3)]
    known = [statistics_of(b, _rows(300, seed=1).float()) for b in originals]
    done: list[tuple[int, int]] = []
    errors = {}
    for steps in (0, 150):
        recipe = Recipe(get_method("fusion"), 0, "scaled", refit=True, tune_steps=steps, match="sign")
        found = reduce_ffns(recipe, originals, [8, 8, 8], known, lambda *now: done.append(now))
        errors[steps] = [_error(ffn.bundle, s) for ffn, s in zip(found, known, strict=True)]
        unmatched = reduce_ffns(dataclasses.replace(recipe, match=None), originals, [8, 8, 8], known)
        for ffn, other, s in zip(found, unmatched, known, strict=True):
            torch.testing.assert_close(
                ffn.reduction.bundle.forward(s.x), other.reduction.bundle.forward(s.x), rtol=1e-4, atol=1e-4
            )
            assert not torch.equal(ffn.reduction.bundle.scale, other.reduction.bundle.scale)  # type: ignore[arg-type]
    assert all(after < 0.95 * before for before, after in zip(errors[0], errors[150], strict=True))
    counts = [now for now, total in done if total == 3 * 151]
    assert counts == sorted(set(counts))
    assert counts[-1] == 3 * 151
    assert len(counts) == 153
    assert [now for now in done if now[1] == 3] == [(1, 3), (2, 3), (3, 3)]


def test_ffns_with_a_sensitivity_and_without_one_are_trained_apart() -> None:
    """As a dense FFN and a shared expert of its shape (GLM's) are."""
    originals = [random_bundle(width=40, seed=seed, dtype=torch.float32) for seed in range(3)]
    known = [statistics_of(b, _rows(300, seed=1).float()) for b in originals]
    factor = torch.diag(torch.linspace(0.2, 2.0, known[1].y.shape[1]))
    known[1] = dataclasses.replace(known[1], sensitivity=factor)
    recipe = Recipe(get_method("fusion"), 0, "scaled", refit=True, tune_steps=20)
    found = reduce_ffns(recipe, originals, [8, 8, 8], known)
    for number, ffn in enumerate(found):
        [alone] = reduce_ffns(recipe, [originals[number]], [8], [known[number]])
        torch.testing.assert_close(ffn.bundle.w_out, alone.bundle.w_out)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("sequential", [False, True])
def test_fuse_tunes_every_family(family: str, sequential: bool) -> None:
    reports = {}
    for steps in (0, 80):
        model = tiny_model(family)
        reports[steps] = fuse(model, 16, calibration=TEXT, tune_steps=steps, sequential=sequential)
    # Sequentially, only the first FFN has the same rows with and without.
    plain, tuned = (sum(row.output_error for row in r.rows[: 1 if sequential else None]) for r in reports.values())
    assert tuned < plain
    assert reports[80].settings.tune_steps == 80
    assert "tuned for 80 steps" in reports[80].table()
    assert "tuned" not in reports[0].table()
    assert FusionReport.from_dict(reports[80].to_dict()) == reports[80]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tune_steps": -1, "calibration": TEXT}, "tune_steps -1: give an integer from 0 on"),
        ({"tune_steps": 1.5, "calibration": TEXT}, "tune_steps 1.5: give an integer from 0 on"),
        ({"tune_steps": True, "calibration": TEXT}, "tune_steps True: give an integer from 0 on"),
        ({"tune_steps": 9}, "tune_steps needs calibration text"),
        ({"tune_steps": 9, "calibration": TEXT, "refit": False}, "leave refit to itself"),
    ],
)
def test_refusals_leave_the_model_alone(options: dict[str, Any], message: str) -> None:
    model = tiny_model("bert")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message):
        fuse(model, 16, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_interrupted_tuning_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("bert")
    before = copy.deepcopy(model.state_dict())
    steps: list[int] = []

    def interrupted(step: int, _total: int) -> float:
        steps.append(step)
        if step == 5:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr("mlp_fusion.calibration.local_training._schedule", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fuse(model, 16, calibration=TEXT, tune_steps=20)
    assert steps == list(range(6))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_command_line_passes_steps_on(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def stop(*_args: Any, **options: Any) -> None:
        seen.update(options)
        raise InputError("far enough")

    monkeypatch.setattr("mlp_fusion.compress", stop)
    CliRunner().invoke(
        cli, ["compress", "m", str(tmp_path / "out"), "--width", "16", "--tune", "300", "--calibration", "t"]
    )
    assert seen["tune_steps"] == 300
    monkeypatch.undo()
    with pytest.raises(InputError, match="tune_steps needs calibration text"):
        compress("m", tmp_path / "out", 16, tune_steps=5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*fewer than 2 for each")
@pytest.mark.parametrize("stream", [False, True])
def test_the_report_knows_what_was_trained(stream: bool, tmp_path: Path) -> None:
    folder = ck.save_tiny(tmp_path / "source", "llama", task="CausalLM", vocab_size=8)
    ck.add_tokenizer(folder, pad_token="<pad>")
    text = tmp_path / "text.txt"
    for count, trained in ((1, False), (60, True)):
        text.write_text("a b c d\n" * count, encoding="utf-8")
        out = tmp_path / str(count)
        report = compress(folder, out, 16, calibration=text, method="merge", tune_steps=2, stream=stream)
        assert [row.trained for row in report.rows] == [trained] * 3
        assert ("tuned for 2 steps" in str(report)) == trained
        assert ("too few tokens to tune" in str(report)) != trained
    report = compress(folder, tmp_path / "plain", 16, calibration=text, method="merge", stream=stream)
    assert [row.trained for row in report.rows] == [None] * 3
