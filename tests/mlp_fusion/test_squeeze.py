"""Dimension squeezing: which bonds go, and the verb from round to round."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

import checkpoints as ck
import mlp_fusion
from commands import Run
from mlp_fusion import InputError, mpo_decompose, squeeze
from mlp_fusion.cli import cli
from mlp_fusion.companions.squeezing import cuts, squeeze_bonds, stored_size
from mlp_fusion.verbs import squeeze as module

ROWS = [{"text": ("the cat sat a cat", "a the")[n % 2], "label": n % 2} for n in range(32)]
OPTIONS: dict[str, Any] = {"task": "classification", "batch_size": 8, "max_length": 8, "round_share": 0.2}


def chains() -> dict[str, Any]:
    """Two matrices of one shape; the first is nearly of a chain of small bonds."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 4), (3, 4, 3))
    noisy = torch.randn(24, 36, generator=generator, dtype=torch.float64)
    easy = mpo_decompose(noisy, shapes).truncated(2).matrix() + 0.01 * noisy
    return {name: mpo_decompose(weight, shapes) for name, weight in (("easy", easy), ("noisy", noisy))}


def test_what_costs_least_is_cut_first() -> None:
    known = chains()
    found = squeeze_bonds(known, 1400)
    assert found.parameters <= 1400
    assert found.bonds["noisy"] == list(known["noisy"].bonds), "nothing of the matrix that needs all"
    assert max(found.bonds["easy"]) < max(known["easy"].bonds)
    lost = known["easy"].discarded(found.bonds["easy"]).square().sum()
    assert found.error == pytest.approx(float(lost / known["easy"].spectra[0].square().sum()))
    # One cut less, and there would be more parameters than allowed.
    assert squeeze_bonds(known, found.parameters).bonds == found.bonds
    fewer = squeeze_bonds(known, 800)
    assert all(a <= b for name in known for a, b in zip(fewer.bonds[name], found.bonds[name], strict=True))
    least = squeeze_bonds(known, 2 * (6 + 12 + 12))
    assert all(size == 1 for own in least.bonds.values() for size in own)
    with pytest.raises(InputError, match="with all bonds at 1"):
        squeeze_bonds(known, 59)


def share_lost(chain: Any, bonds: Any) -> float:
    return float(chain.discarded(bonds).square().sum() / chain.spectra[0].square().sum())


def test_a_matrix_is_cut_at_the_bond_where_a_number_costs_least() -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    chain = mpo_decompose(weight.cumsum(dim=0), ((2, 4, 5), (4, 4, 4)))
    found = list(cuts(chain))
    assert found[0].bonds == chain.bonds
    assert found[-1].bonds == (1, 1)
    for now, then in itertools.pairwise(found):
        prices = {}
        for bond, size in enumerate(now.bonds):
            if size > 1:
                fewer = list(now.bonds)
                fewer[bond] = max(1, size - max(1, chain.bonds[bond] // 32))
                saved = chain.truncated(now.bonds).numel - chain.truncated(fewer).numel
                lost = share_lost(chain, fewer) - share_lost(chain, now.bonds)
                prices[tuple(fewer)] = lost / saved
        assert prices[then.bonds] == pytest.approx(min(prices.values()), rel=1e-9, abs=1e-15)
        assert then.error == pytest.approx(share_lost(chain, then.bonds), abs=1e-12)
        assert then.parameters == min(weight.numel(), chain.truncated(then.bonds).numel)


def test_no_other_choice_of_cuts_loses_less() -> None:
    """Among matrices of several sizes; as long as the last one is not left with more than it needed."""
    generator = torch.Generator().manual_seed(1)
    sizes = {"small": (24, 36), "large": (64, 96), "even": (30, 30)}
    known = {
        name: mpo_decompose(torch.randn(*size, generator=generator, dtype=torch.float64).cumsum(dim=1), length=3)
        for name, size in sizes.items()
    }
    curves = [list(cuts(chain)) for chain in known.values()]
    every = [(sum(c.parameters for c in some), sum(c.error for c in some)) for some in itertools.product(*curves)]
    whole = sum(curve[0].parameters for curve in curves)
    gaps = []
    for allowed in range(200, whole, 150):
        found = squeeze_bonds(known, allowed)
        assert found.parameters <= allowed
        assert found.error == pytest.approx(sum(share_lost(known[name], own) for name, own in found.bonds.items()))
        gaps.append(found.error - min(error for count, error in every if count <= allowed))
    assert max(gaps) < 0.05
    assert sorted(gaps)[len(gaps) // 2] < 0.01


def test_a_large_matrix_is_cut_where_it_saves_more() -> None:
    """Of matrices with spectra alike, though the same share of a small one is as cheap."""
    generator = torch.Generator().manual_seed(3)
    known = {
        name: mpo_decompose(torch.randn(*size, generator=generator, dtype=torch.float64), length=3)
        for name, size in (("small", (32, 32)), ("large", (512, 64)))
    }
    whole = sum(chain.shape[0] * chain.shape[1] for chain in known.values())
    found = squeeze_bonds(known, int(0.9 * whole))
    assert found.bonds["small"] == list(known["small"].bonds)
    assert found.bonds["large"] != list(known["large"].bonds)


def test_a_chain_that_is_larger_than_its_matrix_is_stored_whole() -> None:
    assert stored_size((24, 36), [6, 12, 12], [6, 12]) == 24 * 36
    assert stored_size((24, 36), [6, 12, 12], [2, 3]) == 6 * 2 + 2 * 12 * 3 + 3 * 12


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = ck.save_tiny(tmp_path_factory.mktemp("source") / "bert")
    return ck.add_tokenizer(folder, pad_token="<pad>", eos_token="</s>")


def test_a_run_that_cannot_begin_leaves_nothing(source: Path, tmp_path: Path) -> None:
    rows = [{"text": "the cat", "label": "one"}] * 8  # one class: there is nothing to learn
    for width in (None, 0.5):
        with pytest.raises(InputError, match="only one class"):
            squeeze(source, tmp_path / "out", rows, rows, **OPTIONS, target_parameters=0.9, width=width)
        assert not any((tmp_path / "out").iterdir())


def test_more_parameters_than_there_are_is_no_target(source: Path, tmp_path: Path) -> None:
    whole = AutoModelForSequenceClassification.from_pretrained(source).num_parameters()
    with pytest.raises(InputError, match=f"target_parameters {whole}: the model has {whole:,}, so that nothing"):
        squeeze(source, tmp_path / "out", ROWS, ROWS, **OPTIONS, target_parameters=whole)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_fusion_and_chains_together(source: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "width": 0.5, "target_parameters": 0.7}
    report = squeeze(source, tmp_path / "out", ROWS, ROWS, **options)
    base = AutoModelForSequenceClassification.from_pretrained(source)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert report.whole == base.num_parameters()
    assert report.rounds[0]["parameters"] == merged.num_parameters() < report.whole, "the FFNs were fused first"
    assert merged.config.intermediate_size == base.config.intermediate_size // 2
    # Shares are of the model as it was given.
    assert report.rounds[-1]["parameters"] <= 0.7 * report.whole < report.rounds[-2]["parameters"]
    assert not (tmp_path / "out" / "rounds").exists()
    assert f"{report.rounds[0]['parameters'] / report.whole:.1%}" in report.table()


@pytest.mark.slow
def test_rounds_end_where_they_are_told_to(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = squeeze(source, out, ROWS, ROWS, target_parameters=0.7, **OPTIONS)
    whole = sum(p.numel() for p in AutoModelForSequenceClassification.from_pretrained(source).parameters())
    sizes = [one["parameters"] for one in report.rounds]
    assert sizes[0] == whole
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == 3
    assert sizes[-1] <= 0.7 * whole < sizes[-2]
    assert report.chosen == 2
    assert json.loads((out / "squeeze.json").read_text())["rounds"] == report.rounds
    assert (out / "squeeze.svg").read_text().startswith("<svg")
    assert not (out / "rounds").exists()
    assert report.table().splitlines()[-1] == "* written"
    merged = AutoModelForSequenceClassification.from_pretrained(out).eval()
    base = AutoModelForSequenceClassification.from_pretrained(source).eval()
    chained = PeftModel.from_pretrained(base, out / "adapter").eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        torch.testing.assert_close(chained(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-5)
    stored = sum(t.numel() for name, t in ck.tensors(out / "adapter").items() if ".mpo_" in name)
    assert stored < whole
    for name, bonds in report.rounds[-1]["bonds"].items():
        chain = mpo_decompose(merged.get_submodule(name).weight.double())
        if tuple(map(math.prod, chain.shapes)) != chain.shape:
            continue  # what was trained beyond the matrix is cut off
        assert all(float(s[size:].norm()) < 1e-4 for s, size in zip(chain.spectra, bonds, strict=True)), name
    with pytest.raises(InputError, match="is complete"):
        squeeze(source, out, ROWS, ROWS, target_parameters=0.7, resume=True, **OPTIONS)
    with pytest.raises(InputError, match="is not empty"):
        squeeze(source, out, ROWS, ROWS, target_parameters=0.7, **OPTIONS)


@pytest.mark.slow
def test_the_last_round_within_the_loss_is_kept_and_an_interrupted_run_goes_on(source: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "target_parameters": 0.5, "max_loss": -1.0}
    whole = squeeze(source, tmp_path / "whole", ROWS, ROWS, **options)
    assert len(whole.rounds) == 2
    assert whole.chosen == 0

    def stop(stage: str, done: int, *_: Any) -> None:
        if (stage, done) == ("round 1", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        squeeze(source, tmp_path / "cut", ROWS, ROWS, progress=stop, **options)
    with pytest.raises(InputError, match=r"other options \(seed\)"):
        squeeze(source, tmp_path / "cut", ROWS, ROWS, resume=True, seed=1, **options)
    resumed = squeeze(source, tmp_path / "cut", ROWS, ROWS, resume=True, **options)
    assert resumed.rounds == whole.rounds
    one, other = (ck.tensors(tmp_path / name) for name in ("cut", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.slow
def test_a_round_that_ended_before_it_was_noted_is_not_trained_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OPTIONS, "target_parameters": 0.85}
    whole = squeeze(source, tmp_path / "whole", ROWS, ROWS, **options)
    write, count = module.write_json, itertools.count()

    def killed(file: Path, content: dict[str, Any]) -> None:
        if next(count) == 1:  # the journal behind the first round
            raise KeyboardInterrupt
        write(file, content)

    monkeypatch.setattr(module, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        squeeze(source, tmp_path / "cut", ROWS, ROWS, **options)
    stages: list[str] = []
    resumed = squeeze(
        source, tmp_path / "cut", ROWS, ROWS, resume=True, progress=lambda stage, *_: stages.append(stage), **options
    )
    assert set(stages) == {"round 1"}
    assert resumed.rounds == whole.rounds


@pytest.mark.slow
def test_it_ends_where_nothing_is_left_to_cut(source: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "round_share": 0.9, "embeddings": False}
    with pytest.raises(InputError, match=r"all bonds at 1 leave [\d,]+: raise target_parameters"):
        squeeze(source, tmp_path / "few", ROWS, ROWS, **options, target_parameters=100)
    report = squeeze(source, tmp_path / "all", ROWS, ROWS, **options, max_loss=1e9)
    assert len(report.rounds) == report.chosen + 1 == 2
    assert all(size == 1 for bonds in report.rounds[-1]["bonds"].values() for size in bonds)


@pytest.mark.parametrize(("words", "embeddings"), [([], False), (["--embeddings"], True)])
def test_the_command_line_cuts_embeddings_as_python_does(words: list[str], embeddings: bool) -> None:
    typed = ["model", "out", "--task", "lm", "--train", __file__, "--eval", __file__, *words]
    context = cli.commands["squeeze"].make_context("squeeze", typed)  # type: ignore[attr-defined]
    assert context.params["embeddings"] is embeddings


def test_it_needs_an_end(source: Path, tmp_path: Path, run: Run) -> None:
    with pytest.raises(InputError, match="nothing ends it"):
        squeeze(source, tmp_path / "out", ROWS, ROWS, **OPTIONS)
    with pytest.raises(InputError, match=r"target_parameters 2\.5: give a share below 1, or a whole count"):
        squeeze(source, tmp_path / "out", ROWS, ROWS, **OPTIONS, target_parameters=2.5)
    done = run(
        "squeeze", source, tmp_path / "out", "--task", "lm", "--train", tmp_path / "no.txt", "--eval",
        tmp_path / "no.txt", "--target-parameters", "0.5",
    )  # fmt: skip
    assert done.code == 2
    assert "no.txt" in done.error
    assert mlp_fusion.SqueezeReport is not None
