"""`finetune`: train a (fused) model on a task, with distillation, checkpoints and resume."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
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
    fused_parameters,
    load_original,
    load_student,
    load_teacher,
    positions,
    with_companion,
)
from mlp_fusion.finetuning.result import ADAPTER_FOLDER, RESULT_FILE, FinetuneReport, Progress
from mlp_fusion.measure.report import finite
from mlp_fusion.running.runner import naming_outputs, resolve_device
from mlp_fusion.settings import FinetuneSettings
from mlp_fusion.store.output import check_output
from mlp_fusion.store.record import fusion_record

METRICS = {"classification": "accuracy", "lm": "perplexity"}
#: Points of a learning curve.
_CURVE = 100
#: Checkpoints of an unfinished run, and what it was started with; gone when it is complete.
_WORK = "checkpoints"
_STATE = "state.json"


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
        if settings.peft is not None:
            if original is not None:
                raise InputError(
                    "original fits the fused layers' own weights, which stay with peft: leave out one of them"
                )
            student = with_companion(student, settings.peft, settings.peft_options or {}, settings.task)
        taught = None if teacher is None else load_teacher(teacher, settings.task, student)
        fitted = None if original is None else load_original(original, student)
        names = {"model": student.name, "teacher": _name(teacher), "original": _name(original)}
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
    largest, size = max(int(max(row["input_ids"])) for row in made), student.model.config.vocab_size
    if largest >= size:
        raise InputError(f"{rows.source}: the tokenizer makes token {largest}, the model knows {size}: another's?")
    return made


class Run:
    """The stages of one run, and what has to outlive an interrupt."""

    def __init__(
        self, settings: FinetuneSettings, models: Models, train: Any, evaluation: Any, out: Path,
        progress: Progress | None,
    ) -> None:  # fmt: skip
        self.settings, self.models, self.out, self.progress = settings, models, out, progress
        self.work, self.cpu = out / _WORK, resolve_device(settings.device).type == "cpu"
        self.examples, self.held_out = train, evaluation
        self.state: dict[str, Any] = {"settings": {}, "initial": None, "layerwise": None, "start": None}
        self.curve: list[dict[str, float]] = []
        self.evaluations: list[dict[str, float]] = []

    def open(self, **data: Any) -> None:
        """Note what is run on `data`, or compare it with what an unfinished run was started with."""
        if processes() > 1:
            # The first process is about to fill the folder that the others have yet to find empty.
            import accelerate

            accelerate.PartialState(cpu=self.cpu).wait_for_everyone()
        known = {"examples": len(self.examples), "processes": processes(), **data}
        description = {**self.settings.recorded(), **self.models.names, **known}
        file = self.work / _STATE
        if self.settings.resume and file.is_file():
            self.state = json.loads(file.read_text(encoding="utf-8"))
            for name, value in self.state["settings"].items():
                if description.get(name) != value:
                    now = description.get(name)
                    raise InputError(f"the unfinished run had {name} {value}, now it is {now}: resume with the same")
            return
        self.work.mkdir(parents=True, exist_ok=True)
        self._note(settings=description)

    def _note(self, **known: Any) -> None:
        self.state.update(known)
        if is_main():
            write_json(self.work / _STATE, self.state)

    def train(self) -> None:
        """Evaluate, distil layer by layer, train."""
        with contextlib.ExitStack() as stack:
            for loaded in self.models:
                stack.enter_context(naming_outputs(loaded))
            self._train()

    def _train(self) -> None:
        # Here, because this import needs accelerate.
        from mlp_fusion.finetuning.trainers import LayerwiseTrainer, TaskTrainer

        s, model, original = self.settings, self.models.student.model, self.models.original
        trainer = TaskTrainer(
            weight=s.distill_weight, temperature=s.temperature,
            **self._common("train", self.models.teacher, s.rate(), s.epochs, evaluate=True),
        )  # fmt: skip
        checkpoint = last_checkpoint(self.work / "train")
        if self.state["initial"] is None and self.held_out is not None:
            self._note(initial=self._measure(trainer.evaluate()))
        if original is not None and checkpoint is None:
            # Of a stage that was complete, this loads the last checkpoint and takes no step.
            layerwise = LayerwiseTrainer(
                layers=original[1],
                **self._common("layerwise", original[0], s.layerwise_learning_rate, s.layerwise_epochs, evaluate=False),
            )
            record = fusion_record(model.config)
            assert record is not None
            with _only_trains(model, fused_parameters(model, record["fused_layers"])):
                self._go(layerwise, last_checkpoint(self.work / "layerwise"))
            loss = [[entry["step"], entry["loss"]] for entry in layerwise.state.log_history if "loss" in entry]
            self._note(layerwise={"steps": layerwise.state.global_step, "loss": loss})
        if self.held_out is not None and checkpoint is None:
            distilled = self.state["layerwise"] is not None
            self._note(start=self._measure(trainer.evaluate()) if distilled else self.state["initial"])
        self._go(trainer, checkpoint)
        history = trainer.state.log_history
        if self.held_out is not None:
            if not any("eval_loss" in e and e["step"] == trainer.state.global_step for e in history):
                trainer.evaluate()
                history = trainer.state.log_history
            later = [e for e in history if "eval_loss" in e and e["step"] > 0]
            self.evaluations = [
                {"step": 0, "epoch": 0.0, **self.state["start"]},
                *({"step": e["step"], "epoch": e["epoch"], **self._measure(e)} for e in later),
            ]
        keys = ("step", "epoch", "loss", "learning_rate")
        self.curve = [{key: e[key] for key in keys} for e in history if "loss" in e]

    def write(self, seconds: float) -> FinetuneReport:
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
            final=self.evaluations[-1] if self.evaluations else None,
            train=self.curve,
            evaluations=self.evaluations,
            distillation={
                "layerwise": self.state["layerwise"],
                "logits": None if self.models.teacher is None else logits,
            },
            seconds=seconds,
        )
        if is_main():
            if s.peft is not None:
                student.model.save_pretrained(self.out / ADAPTER_FOLDER, save_embedding_layers=False)
            whole = student.model if s.peft is None else student.model.merge_and_unload()
            whole.save_pretrained(self.out)
            student.tokenizer.save_pretrained(self.out)
            write_json(self.out / RESULT_FILE, report.to_dict())
            shutil.rmtree(self.work)
        return report

    def _go(self, trainer: Any, checkpoint: Path | None) -> None:
        # Evaluating or resuming has used up random numbers: every stage starts from the seed.
        transformers.set_seed(self.settings.seed)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

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
        steps = max(1, math.ceil(math.ceil(len(self.examples) / (s.batch_size * processes())) * epochs))
        by_steps = s.checkpoint_steps is not None
        arguments = transformers.TrainingArguments(
            output_dir=str(self.work / stage),
            num_train_epochs=epochs,
            per_device_train_batch_size=s.batch_size // s.accumulation,
            per_device_eval_batch_size=s.batch_size // s.accumulation,
            gradient_accumulation_steps=s.accumulation,
            learning_rate=rate,
            weight_decay=s.weight_decay,
            # A share becomes a count here: 1.0 would be taken for one step.
            warmup_steps=math.ceil(s.warmup * steps),
            lr_scheduler_type="linear",
            logging_steps=max(1, steps // _CURVE),
            logging_nan_inf_filter=False,
            save_strategy="steps" if by_steps else "epoch",
            save_steps=s.checkpoint_steps if s.checkpoint_steps is not None else 500,
            save_total_limit=1,
            eval_strategy="epoch" if evaluate and self.held_out is not None else "no",
            prediction_loss_only=not labelled,
            remove_unused_columns=False,
            dataloader_pin_memory=not self.cpu,
            bf16=not self.cpu and torch.cuda.is_bf16_supported(),
            use_cpu=self.cpu,
            seed=s.seed,
            label_names=["labels"],  # of a model in a wrapper, the trainer could not tell
            report_to="none",
            disable_tqdm=True,
            log_level="error",
        )
        collator: Any = transformers.default_data_collator
        if labelled:
            # Behind the texts, where no position shifts; the tokenizer itself is saved as it was.
            padder = copy.deepcopy(self.models.student.tokenizer)
            padder.padding_side = "right"
            collator = transformers.DataCollatorWithPadding(padder)
        momentum = {"lr": rate, "momentum": 0.9, "weight_decay": s.weight_decay}
        return {
            "model": self.models.student.model,
            "args": arguments,
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


@contextlib.contextmanager
def _only_trains(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within it, of `model` only `parameters` require gradients."""
    kept = {id(p) for p in parameters}
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint below `folder`: the trainer writes its state file last."""
    found = [p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    return max(found, key=lambda p: int(p.name.split("-")[1]), default=None)


def is_unfinished(out: Path) -> bool:
    """Whether `out` holds a run that can be resumed."""
    return (out / _WORK / _STATE).is_file()


def check_folder(out: Path, resume: bool) -> None:
    """Raise InputError unless a run can begin in `out`, or go on there."""
    if (out / RESULT_FILE).is_file():
        raise InputError(f"{out} holds a finished run: choose another folder")
    if resume:
        if not is_unfinished(out):
            raise InputError(f"{out} holds no unfinished run: leave out resume to start one")
    elif is_unfinished(out):
        raise InputError(f"{out} holds an unfinished run: go on with resume, or choose another folder")
    else:
        check_output(out)


def is_main() -> bool:
    """Whether this process is the first of those that torchrun started; it alone writes."""
    return int(os.environ.get("RANK", "0")) == 0


def processes() -> int:
    """How many processes torchrun started."""
    # As torchrun says, before anything has been set up.
    return int(os.environ.get("WORLD_SIZE", "1"))


def digest(rows: Rows | None) -> str | None:
    """A hash of all that is trained on."""
    if rows is None:
        return None
    return hashlib.sha256(json.dumps([rows.texts, rows.pairs, rows.labels]).encode()).hexdigest()[:16]


def _name(model: Model | None) -> str | None:
    if model is None:
        return None
    return str(model) if isinstance(model, (str, Path)) else type(model).__name__


def write_json(file: Path, content: dict[str, Any]) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, file)


def _best_class(logits: Any, _: Any) -> Any:
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def _accuracy(found: Any) -> dict[str, float]:
    return {"accuracy": float((found.predictions == found.label_ids).mean())}
