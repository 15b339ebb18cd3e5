"""SAID: what cannot be is said in one line; and transformers' Trainer trains it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from companion_models import attached, classifier, logits
from peft import PeftModel, get_peft_model
from torch import nn

import mlp_fusion


def broken(change: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    change(model)
    return model


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (classifier, {"d": 0}, "d is 0: give a count of 1 or more"),
        (
            classifier,
            {"d": 41},
            r"d is 41, and each of 41 tensors takes one for its lambda: raise it above that, or use",
        ),
        (lambda: nn.Sequential(nn.Linear(3, 3)), {"d": 13}, "d is 13, the tensors have 12 entries: lower it"),
        (lambda: nn.Sequential(nn.ReLU()), {"d": 13}, "none of the modules has parameters to move"),
        (
            lambda: broken(lambda m: m.register_parameter("shift", nn.Parameter(torch.ones(4)))),
            {"d": 13},
            "shift belongs to the model itself",
        ),
        (lambda: broken(lambda m: m.to("meta")), {"d": 13}, "0.weight is on the meta device"),
        (lambda: broken(lambda m: m.to(torch.float8_e4m3fn)), {"d": 13}, "quantised"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), {"d": 5, "entries": 20}, "tensors with 20 entries, these have 12"),
    ],
)
def test_what_cannot_be_is_said(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(mlp_fusion.InputError, match=message):
        get_peft_model(model(), mlp_fusion.SaidConfig(**options))


def test_another_base_is_refused(tmp_path: Path) -> None:
    attached(classifier(), mlp_fusion.SaidConfig(d=100)).save_pretrained(tmp_path)
    with pytest.raises(mlp_fusion.InputError, match="load the base that they were trained on"):
        PeftModel.from_pretrained(classifier(intermediate_size=40), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_transformers_trainer_trains_it(fused: bool, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = classifier()
    if fused:
        mlp_fusion.fuse(model, 16)
    made = get_peft_model(model, mlp_fusion.SaidConfig(d=100, modules_to_save=["classifier"]))
    ids = torch.randint(5, 90, (64, 6), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": int(row[0] > 45)} for row in ids]
    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=12, per_device_train_batch_size=16, learning_rate=0.03, report_to=[],
        save_strategy="epoch", save_total_limit=1, use_cpu=True, disable_tqdm=True, logging_strategy="epoch",
    )  # fmt: skip
    trainer = Trainer(made, arguments, train_dataset=rows)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    [checkpoint] = tmp_path.glob("checkpoint-*")
    base = classifier()
    if fused:
        mlp_fusion.fuse(base, 16)
    again = PeftModel.from_pretrained(base, checkpoint).eval()
    assert torch.equal(logits(again), logits(made.eval()))
