"""The records of options: what they check, what they say, and that signatures and the command line follow them."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import click
import pytest

import mlp_fusion
from mlp_fusion import InputError
from mlp_fusion.choices import AUTOMATIC_STEPS, CALIBRATION_SENTENCES, PEFT_METHODS, PEFT_RATES
from mlp_fusion.cli import cli
from mlp_fusion.settings import (
    CompressSettings,
    FuseSettings,
    PlanSettings,
    Settings,
    fields,
    make,
    option,
    takes,
)
from mlp_fusion.tuning import FinetuneSettings

VERBS = {"plan": PlanSettings, "fuse": FuseSettings, "compress": CompressSettings, "finetune": FinetuneSettings}


def check(*, calibrated: bool = False, **options: Any) -> None:
    FuseSettings(**{"width": 0.5, **options}).check(calibrated=calibrated)


@pytest.mark.parametrize(
    "change", [{}, {"seed": 2**63 - 1}, {"optimizer": None}, {"calibrated": True, "tune_steps": 1}]
)
def test_options_that_go_together(change: dict[str, Any]) -> None:
    check(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({"seed": seed}, "seed .* give an integer from 0 to 2\\*\\*63 - 1")
            for seed in (-1, 2**63, 10**400, True, 1.0, "0", None)
        ),
        *(
            ({"calibrated": True, "width": "auto", "budget": b}, "strictly between 0 and 1")
            for b in (0.0, 1.0, -0.5, 2.0, float("nan"), True)
        ),
        *(({"tune_steps": steps}, "tune_steps .* give an integer from 0 on") for steps in (-1, True, 1.5)),
        *(({"calibration_sentences": n}, "give an integer from 1 on") for n in (0, -3, True)),
        *(({"calibration_rows": n, "calibrated": True}, "give an integer from 1 on") for n in (0, -3, True)),
        *(({"sequential": n, "calibrated": True}, "sequential ") for n in (0, 1, "yes")),
        *(({"refit": n, "calibrated": True}, "refit ") for n in (0, 1, "yes")),
        ({"tune_steps": 1}, "tune_steps needs calibration text"),
        ({"refit": True}, "refit needs calibration text"),
        ({"match": "gd"}, "match needs calibration text"),
        ({"sequential": True}, "sequential needs calibration text"),
        ({"width": "auto", "budget": 0.5}, "width auto needs calibration text"),
        ({"calibration_rows": 5}, "calibration_rows needs calibration text"),
        ({"calibration_sentences": CALIBRATION_SENTENCES + 1}, "calibration_sentences needs calibration text"),
        ({"calibration_sentences": CALIBRATION_SENTENCES - 1}, "calibration_sentences needs calibration text"),
        ({"match": "adam", "calibrated": True}, "use gd, sign, auto or none"),
        ({"match": "gd", "calibrated": True, "optimizer": None}, "match needs an optimizer"),
        ({"tune_steps": 3, "refit": False, "calibrated": True}, "starts from a refit"),
        ({"method": "svd"}, "keeps the width"),
        ({"method": "select"}, "method select needs calibration text"),
        ({"method": "magic"}, "unknown method"),
        ({"optimizer": "adamm"}, "unknown optimizer 'adamm'"),
        ({"budget": 0.5, "calibrated": True}, "go together"),
        ({"width": "auto", "calibrated": True}, "go together"),
        ({"width": "most"}, "width 'most'"),
    ],
)
def test_options_that_do_not(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        check(**change)
    assert "\n" not in str(caught.value)


FINETUNING: dict[str, Any] = {"task": "lm"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "regression"}, "use classification or lm"),
        ({"optimizer": "adam"}, "use adamw or sgd"),
        ({"device": "cuda:1"}, "use auto, cpu or cuda"),
        *(({name: 0.0}, f"{name} 0.0: give a number above 0") for name in ("epochs", "learning_rate", "temperature")),
        *(({"epochs": value}, "epochs") for value in (float("nan"), float("inf"), -1.0, True, "3")),
        *(({name: 0}, f"{name} 0: give an integer from 1 on") for name in ("batch_size", "max_length")),
        ({"warmup": 1.1}, "warmup 1.1: give a number from 0 to 1"),
        ({"weight_decay": float("inf")}, "weight_decay inf: give a number from 0 on"),
        ({"checkpoint_steps": 0}, "checkpoint_steps 0"),
        ({"seed": 2**32}, r"2\*\*32 - 1"),
        ({"batch_size": 30, "accumulation": 4}, "no multiple of accumulation 4"),
    ],
)
def test_fine_tuning_options_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    FinetuneSettings(**FINETUNING).check()
    with pytest.raises(InputError, match=message):
        FinetuneSettings(**{**FINETUNING, **change}).check()


@pytest.mark.parametrize(
    "good", [{"epochs": 1}, {"warmup": 0.0}, {"warmup": 1}, {"checkpoint_steps": None}, {"weight_decay": 0}]
)
def test_fine_tuning_options_at_their_bounds(good: dict[str, Any]) -> None:
    FinetuneSettings(**{**FINETUNING, **good}).check()


def test_resolved_settings_leave_nothing_open() -> None:
    settings = FuseSettings(width=0.5, match="auto", optimizer="sgd").resolved([1, 2], calibrated=True)
    assert (settings.match, settings.refit, settings.layers) == ("gd", True, [1, 2])
    assert FuseSettings(width=0.5).resolved([0], calibrated=False).refit is False
    assert FuseSettings(width=0.5, refit=False).resolved([0], calibrated=True).refit is False
    assert FuseSettings(width=0.5, match="auto").resolved([0], calibrated=True).match == "sign"


def test_what_is_measured_to_be_best_is_what_no_method_and_text_come_to() -> None:
    def found(
        calibrated: bool = True, *, count: int = 2, known: dict[str, bool] | None = None, **options: Any
    ) -> tuple[Any, ...]:
        asked = FuseSettings(width=0.5, **options)
        settings = asked.resolved([*range(count)], calibrated=calibrated, **(known or {}))
        return settings.method, settings.sequential, settings.tune_steps

    plain = ("fusion", False, 0)
    assert found() == ("merge", True, AUTOMATIC_STEPS)
    assert found(count=1) == ("merge", False, AUTOMATIC_STEPS), "one FFN has none before it"
    assert found(calibrated=False) == plain
    assert found(known={"dense": False}) == ("merge", False, AUTOMATIC_STEPS), "experts, of which order matters little"
    assert found(known={"named": False}) == plain
    assert found(known={"whole": False}) == ("merge", True, AUTOMATIC_STEPS)
    assert found(known={"whole": False, "dense": False}) == plain, "thousands of experts, perhaps"
    assert found(refit=False) == plain
    # Each part by itself; a named method brings none of the others.
    assert found(tune_steps=3, sequential=False) == ("merge", False, 3)
    assert found(known={"whole": False, "dense": False}, sequential=True) == ("fusion", True, 0)
    assert found(method="merge") == ("merge", False, 0)
    assert found(method="prune", tune_steps=5) == ("prune", False, 5)


def test_records_are_plain_and_say_nothing_of_places() -> None:
    settings = CompressSettings(width=0.5, layers=range(2), calibration=Path("mine.txt"), device="cuda:3")
    assert settings.recorded() == {
        "width": 0.5, "budget": None, "layers": [0, 1], "only": None, "multiple": None, "method": "auto",
        "optimizer": "adamw", "seed": 0, "calibration_sentences": CALIBRATION_SENTENCES, "synthetic": None,
        "calibration_rows": None, "refit": None, "match": None, "tune_steps": None, "sequential": None,
        "unmeasured": False,
    }  # fmt: skip
    assert FuseSettings(**settings.recorded()).method == "auto"


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_field_is_in_the_signature_and_the_docstring_once(verb: str) -> None:
    function = getattr(mlp_fusion, verb)
    parameters = inspect.signature(function).parameters
    documentation = inspect.getdoc(function) or ""
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for field in fields(VERBS[verb]):
        assert field.name in parameters
        stated = f"    {field.name}" in documentation or f", {field.name}" in documentation
        assert stated, field.name


@pytest.mark.parametrize("verb", [verb for verb in sorted(VERBS) if verb != "fuse"])
def test_every_field_is_an_option_of_the_command_line_with_its_default(verb: str) -> None:
    command = cli.commands[verb]  # type: ignore[attr-defined]
    options, context = {p.name: p for p in command.params}, click.Context(command)
    for field in fields(VERBS[verb]):
        found = options[field.name]
        assert (found.help or "").startswith(field.option.help)
        assert found.required == (field.default is MISSING)
        known = field.option.none if field.default is None else field.default
        assert found.required or (found.get_default(context) or known) == known


def test_an_option_that_there_is_not() -> None:
    with pytest.raises(TypeError, match=r"fuse\(\) has no option 'tune_step': did you mean 'tune_steps'\?"):
        mlp_fusion.fuse(None, 0.5, tune_step=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="it knows width, budget, layers"):
        make(PlanSettings, {"xyz": 1}, "plan")
    with pytest.raises(TypeError, match="task"):
        mlp_fusion.finetune("model", "out", "train.tsv")


def test_a_new_option_is_one_field() -> None:
    """A record with one more field: checked, recorded, and shown by what takes it."""

    @dataclass(frozen=True, kw_only=True)
    class More(Settings):
        patience: int = option("Epochs without improvement.", 3, least=1)

    @takes(More)
    def train(**options: Any) -> More:
        """Train.

        Args:
            options: its fields.

        Returns:
            They.
        """
        return make(More, options, "train")

    assert list(inspect.signature(train).parameters) == ["patience"]
    assert "    patience: Epochs without improvement.\n" in (inspect.getdoc(train) or "")
    assert train(patience=5).recorded() == {"patience": 5}
    with pytest.raises(InputError, match="patience 0: give an integer from 1 on"):
        train(patience=0).check()


@pytest.mark.parametrize(
    ("peft", "rate", "expected"),
    [(None, None, 5e-5), ("lora", None, 1e-3), ("pafi", None, 1e-2), ("said", 0.3, 0.3), (None, 0.2, 0.2)],
)
def test_the_learning_rate_suits_what_trains(peft: str | None, rate: float | None, expected: float) -> None:
    settings = FinetuneSettings(task="lm", peft=peft, learning_rate=rate)
    assert settings.rate() == settings.recorded()["learning_rate"] == expected


def test_every_method_has_a_learning_rate() -> None:
    assert set(PEFT_RATES) == set(PEFT_METHODS)
    assert FinetuneSettings(task="lm", adapters=True).rate() == 1e-3
