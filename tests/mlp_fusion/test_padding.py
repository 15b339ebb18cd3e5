"""Padding, on whichever side, changes nothing of what a sequence gives by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import checkpoints as ck
import mlp_fusion
from families import FAMILIES, tiny_model
from mlp_fusion.calibration import collect
from mlp_fusion.measure import compare_models
from mlp_fusion.running.batches import padded_behind, take_batches
from mlp_fusion.running.taps import capture_activations
from mlp_fusion.store.record import architecture_of

Batch = dict[str, Tensor]
LENGTHS = (9, 4, 6)


def sequences() -> list[Batch]:
    """One batch per sequence, without padding."""
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 97, (1, length), generator=generator) for length in LENGTHS]
    return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]


def padded(side: str) -> Batch:
    """The same in one batch."""
    rows = []
    for batch in sequences():
        missing = max(LENGTHS) - batch["input_ids"].shape[1]
        where = (missing, 0) if side == "left" else (0, missing)
        # Padding by another token than the config's: RoBERTa counts positions of tokens that are not that one.
        rows.append([torch.nn.functional.pad(t, where, value=v) for t, v in zip(batch.values(), (2, 0), strict=True)])
    return {
        "input_ids": torch.cat([ids for ids, _ in rows]),
        "attention_mask": torch.cat([mask for _, mask in rows]),
    }


def test_padding_moves_behind() -> None:
    batch = {
        "input_ids": torch.tensor([[1, 1, 7, 8], [5, 6, 1, 1], [1, 1, 1, 1], [1, 7, 1, 8]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1]]),
        "position_ids": torch.tensor([[0, 1, 2, 3]]),
        "other": torch.zeros(4, 2),
    }
    moved = padded_behind(batch)
    assert moved["input_ids"].tolist() == [[7, 8, 1, 1], [5, 6, 1, 1], [1, 1, 1, 1], [7, 1, 8, 1]]
    assert moved["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0]]
    # Who says positions means them: they stay with their tokens.
    assert moved["position_ids"].tolist() == [[2, 3, 0, 1], [0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3, 0]]
    assert torch.equal(moved["other"], batch["other"])
    (taken,) = take_batches({"input_ids": batch["input_ids"]}, 1)
    assert torch.equal(taken["input_ids"], batch["input_ids"])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_of_running_a_sample_sees_each_sequence_as_it_is_alone(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    architecture = architecture_of(model.config)
    sites = architecture.sites(model)
    alone = capture_activations(model, architecture, sites, sequences(), rows=99, seed=0)
    known = collect(model, architecture, sites, sequences(), seed=0)
    for side in ("left", "right"):
        rows = capture_activations(model, architecture, sites, padded(side), rows=99, seed=0)
        statistics = collect(model, architecture, sites, [padded(side)], seed=0)
        for one, other in zip(rows, alone, strict=True):
            torch.testing.assert_close(one.y, other.y)
        for found, expected in zip(statistics, known, strict=True):
            torch.testing.assert_close(found.input_moment, expected.input_moment)


def test_reports_and_comparisons_do_not_depend_on_the_side() -> None:
    reports, comparisons = [], []
    for side in ("left", "right"):
        model = tiny_model("gpt2", dtype=torch.float64)
        report = mlp_fusion.fuse(model, 16, sample=padded(side), calibration=[padded(side)], sequential=True)
        reports.append([row.output_error for row in report.rows])
        found = compare_models(tiny_model("gpt2", dtype=torch.float64), model, padded(side), samples=3)
        assert found.network is not None
        comparisons.append(found.network.relative_error)
    assert reports[0] == pytest.approx(reports[1], rel=1e-6)
    assert comparisons[0] == pytest.approx(comparisons[1], rel=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_tokenizer_that_pads_in_front_changes_no_loss(family: str, tmp_path: Path) -> None:
    folder = ck.save_tiny(tmp_path / "source", family)
    ck.add_tokenizer(folder, pad_token="<pad>", eos_token="</s>", padding_side="left")
    data = [{"text": " ".join(["the", "cat", "sat"][: 1 + n % 3]), "label": n % 2} for n in range(12)]
    losses = []
    for size in (1, 12):
        options: dict[str, Any] = {"epochs": 1e-9, "batch_size": size, "learning_rate": 1e-9, "device": "cpu"}
        out = tmp_path / str(size)
        report = mlp_fusion.finetune(folder, out, data, data, task="classification", **options)
        assert report.initial is not None
        losses.append(report.initial["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    # It goes along as it was.
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "12").padding_side == "left"
