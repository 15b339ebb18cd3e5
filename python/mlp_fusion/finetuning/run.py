"""`finetune`: train a (fused) model on a task, with distillation, checkpoints and resume."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from mlp_fusion.errors import InputError
from mlp_fusion.finetuning.data import Rows, class_names, labelled_examples, language_examples
from mlp_fusion.finetuning.loading import (
    Model,
    Student,
    check_tokens,
    fused_parameters,
    load_original,
    load_student,
    load_teacher,
    name_of,
    positions,
    with_adapters,
    with_companion,
)
from mlp_fusion.finetuning.result import ADAPTER_FOLDER, RESULT_FILE, FinetuneReport, Progress
from mlp_fusion.finetuning.session import Session, is_main, learning_curve, only_trains, with_named_outputs
from mlp_fusion.store.record import fusion_record
from mlp_fusion.tuning import FinetuneSettings

METRICS = {"classification": "accuracy", "lm": "perplexity"}


@dataclass(frozen=True, eq=False)
class Models:
    """The models of a run.

    Attributes:
        student: what trains.
        teacher: whose logits it learns from, or None.
        original: the unfused model and the layers that are fitted to its hidden states, or None.
        names: of the three, as the report gives them.
    """

    student: Student
    teacher: nn.Module | None
    original: tuple[nn.Module, list[int]] | None
    names: dict[str, str | None]

    @staticmethod
    def load(
        settings: FinetuneSettings, rows: Rows, model: Model, teacher: Model | None, original: Model | None,
        tokenizer: Any,
    ) -> Models:  # fmt: skip
        """Load what is a folder or a hub name.

        Raises:
            InputError: one cannot be loaded, or does not suit the task or the others.
        """
        classes = class_names(rows) if settings.task == "classification" else []
        student = load_student(model, settings.task, classes, settings.optimizer, tokenizer)
        if original is not None and (settings.adapters or settings.peft is not None):
            raise InputError(
                "original fits the fused layers' own weights, which stay with peft and adapters: leave out one of them"
            )
        if settings.adapters:
            student = with_adapters(student)
        if settings.peft is not None:
            student = with_companion(student, settings.peft, settings.peft_options or {}, settings.task)
        taught = None if teacher is None else load_teacher(teacher, settings.task, student)
        fitted = None if original is None else load_original(original, student)
        names = {"model": student.name, "teacher": name_of(teacher), "original": name_of(original)}
        return Models(student, taught, fitted, names)

    def __iter__(self) -> Iterator[nn.Module]:
        known = (self.student.model, self.teacher, None if self.original is None else self.original[0])
        return (model for model in known if model is not None)

    def examples(self, rows: Rows | None, most: int) -> list[Any] | None:
        """Tokenised rows, cut to what all the models have positions for and to `most` tokens."""
        if rows is None:
            return None
        length = min(most, *(positions(model) or most for model in self))
        # A copy: the length that it cuts texts to would be saved with the tokenizer.
        return _examples(rows, copy.deepcopy(self.student.tokenizer), self.student, length)


def _examples(rows: Rows, tokenizer: Any, student: Student, length: int) -> list[Any]:
    """Tokenised rows, for classification where the student has classes."""
    if student.classes:
        made: list[Any] = labelled_examples(rows, tokenizer, student.classes, length)
    else:
        made = language_examples(rows, tokenizer, length)
    check_tokens(rows, max(int(max(row["input_ids"])) for row in made), student.model)
    return made


class Run(Session):
    """The stages of a fine-tuning."""

    settings: FinetuneSettings

    def __init__(
        self, settings: FinetuneSettings, models: Models, train: Any, evaluation: Any, out: Path,
        progress: Progress | None,
    ) -> None:  # fmt: skip
        super().__init__(settings, train, evaluation, out, progress)
        self.models = models
        self.state |= {"layerwise": None, "start": None}
        self.curve: list[dict[str, float]] = []
        self.measured: list[dict[str, float]] = []

    def train(self) -> None:
        """Evaluate, distil layer by layer, train."""
        with with_named_outputs(self.models):
            self._train()

    def _train(self) -> None:
        # Here, because this import needs accelerate.
        from mlp_fusion.finetuning.trainers import LayerwiseTrainer, TaskTrainer

        s, model, original = self.settings, self.models.student.model, self.models.original
        trainer = TaskTrainer(
            weight=s.distill_weight, temperature=s.temperature,
            **self._common("train", self.models.teacher, s.rate(), s.epochs, evaluate=True),
        )  # fmt: skip
        checkpoint = self.checkpoint("train")
        if self.state["initial"] is None and self.held_out is not None:
            self.note(initial=self._measure(trainer.evaluate()))
        if original is not None and checkpoint is None:
            # Of a stage that was complete, this loads the last checkpoint and takes no step.
            layerwise = LayerwiseTrainer(
                layers=original[1],
                **self._common("layerwise", original[0], s.layerwise_learning_rate, s.layerwise_epochs, evaluate=False),
            )
            record = fusion_record(model.config)
            assert record is not None
            with only_trains(model, fused_parameters(model, record["fused_layers"])):
                self.go(layerwise, self.checkpoint("layerwise"))
            loss = [[entry["step"], entry["loss"]] for entry in layerwise.state.log_history if "loss" in entry]
            self.note(layerwise={"steps": layerwise.state.global_step, "loss": loss})
        if self.held_out is not None and checkpoint is None:
            distilled = self.state["layerwise"] is not None
            self.note(start=self._measure(trainer.evaluate()) if distilled else self.state["initial"])
        self.go(trainer, checkpoint)
        self.measured = self.evaluations(trainer, self.state["start"], self._measure)
        self.curve = learning_curve(trainer)

    def finish(self, seconds: float) -> FinetuneReport:
        """Write the model, its tokenizer and, last, the report; the checkpoints of the run go."""
        s, student, record = self.settings, self.models.student, fusion_record(self.models.student.model.config)
        logits = {"weight": s.distill_weight, "temperature": s.temperature}
        report = FinetuneReport(
            settings=s.recorded(),
            **self.models.names,  # type: ignore[arg-type]
            method=None if record is None else record["method"],
            parameterization=None if record is None else record["parameterization"],
            examples=len(self.examples),
            metric=METRICS[s.task],
            initial=self.state["initial"],
            final=self.measured[-1] if self.measured else None,
            train=self.curve,
            evaluations=self.measured,
            distillation={
                "layerwise": self.state["layerwise"],
                "logits": None if self.models.teacher is None else logits,
            },
            seconds=seconds,
        )
        whole = student.model
        if s.peft is not None and is_main():
            whole.save_pretrained(self.out / ADAPTER_FOLDER, save_embedding_layers=False)
            whole = whole.merge_and_unload()
        self.write(whole, student.tokenizer, report, RESULT_FILE)
        return report

    def _measure(self, metrics: dict[str, float]) -> dict[str, float]:
        loss = metrics["eval_loss"]
        if self.settings.task == "lm":
            return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        return {"loss": loss, "accuracy": metrics["eval_accuracy"]}

    def _common(
        self, stage: str, teacher: nn.Module | None, rate: float, epochs: float, *, evaluate: bool
    ) -> dict[str, Any]:
        """What both stages give their trainer."""
        s, labelled = self.settings, self.settings.task == "classification"
        collator: Any = transformers.default_data_collator
        if labelled:
            # Behind the texts, where no position shifts; the tokenizer itself is saved as it was.
            padder = copy.deepcopy(self.models.student.tokenizer)
            padder.padding_side = "right"
            collator = transformers.DataCollatorWithPadding(padder)
        momentum = {"lr": rate, "momentum": 0.9, "weight_decay": s.weight_decay}
        return {
            "model": self.models.student.model,
            "args": self.arguments(stage, rate, epochs, evaluate=evaluate, predicts=labelled),
            "train_dataset": self.examples,
            "eval_dataset": self.held_out if evaluate else None,
            "data_collator": collator,
            "compute_metrics": _accuracy if labelled else None,
            "preprocess_logits_for_metrics": _best_class if labelled else None,
            "optimizer_cls_and_kwargs": (torch.optim.SGD, momentum) if s.optimizer == "sgd" else None,
            "stage": stage,
            "progress": self.progress,
            "teacher": teacher,
            "by_length": labelled,
        }


def _best_class(logits: Any, _: Any) -> Any:
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def _accuracy(found: Any) -> dict[str, float]:
    return {"accuracy": float((found.predictions == found.label_ids).mean())}
