"""`finetune`: train a (fused) model on a task, with distillation, checkpoints and resume."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from mlp_fusion.errors import InputError
from mlp_fusion.finetuning.data import Data, Rows, class_names, labelled_examples, language_examples, read_rows
from mlp_fusion.finetuning.loading import (
    Model,
    Student,
    fused_parameters,
    load_original,
    load_student,
    load_teacher,
    positions,
)
from mlp_fusion.finetuning.result import RESULT_FILE, FinetuneReport, Progress
from mlp_fusion.finetuning.settings import Settings
from mlp_fusion.measure.report import finite
from mlp_fusion.running.runner import naming_outputs, resolve_device
from mlp_fusion.store.output import check_output, output_path, taken
from mlp_fusion.store.record import fusion_record

_METRICS = {"classification": "accuracy", "lm": "perplexity"}
#: Points of a learning curve.
_CURVE = 100
#: Checkpoints of an unfinished run, and what it was started with; gone when it is complete.
_WORK = "checkpoints"
_STATE = "state.json"


def finetune(
    model: Model,
    out: str | Path,
    train: Data,
    evaluation: Data | None = None,
    *,
    task: str,
    teacher: Model | None = None,
    original: Model | None = None,
    columns: Sequence[str] | None = None,
    tokenizer: Any = None,
    optimizer: str = "adamw",
    learning_rate: float = 5e-5,
    weight_decay: float = 0.01,
    warmup: float = 0.06,
    epochs: float = 3.0,
    batch_size: int = 32,
    accumulation: int = 1,
    max_length: int = 128,
    distill_weight: float = 0.5,
    temperature: float = 2.0,
    layerwise_epochs: float = 1.0,
    layerwise_learning_rate: float = 5e-4,
    checkpoint_steps: int | None = None,
    device: str = "auto",
    seed: int = 0,
    resume: bool = False,
    progress: Progress | None = None,
) -> FinetuneReport:
    """Train a model on a task through `transformers.Trainer` and write it to `out`.

    Fused models train in the parameterization that suits `optimizer` (see :func:`mlp_fusion.restore`) and are written
    as `save_pretrained` writes them: a plain checkpoint, and the scale in a subfolder. The weights are those of the
    last step. The same seed gives the same weights on one machine. On CUDA it trains under bfloat16 autocast where the
    GPU can, and under `torchrun` on several.

    Args:
        model: a folder or hub name, fused or not, which trains in float32; or a model in memory, which is then trained
            itself.
        out: folder to make. It holds the checkpoints of the unfinished run, and in the end the model, its tokenizer
            and `finetune.json`, the report.
        train, evaluation: files, datasets or rows: see :func:`mlp_fusion.running.rows.read_rows`. Texts of `lm` are
            put end to end and cut into blocks of `max_length` tokens.
        task: `classification` of texts or pairs of texts, or `lm`, causal language modelling.
        teacher: a model trained on the task, for its logits.
        original: the unfused model; before training, hidden states behind the fused layers are fitted to its own.
        columns: the text's column or columns, where they have unusual names.
        tokenizer: None for the one beside the model's weights.
        optimizer: `adamw`, or `sgd` with momentum 0.9.
        learning_rate, weight_decay, warmup, epochs: peak rate, decay, share of the steps that the rate rises over
            before it falls linearly to zero, and passes over the data.
        batch_size: rows per step and device, in `accumulation` parts.
        max_length: tokens of a text, beyond which it is cut; no more than all the models have positions for.
        distill_weight, temperature: of the teacher's logits against the labels.
        layerwise_epochs, layerwise_learning_rate: of the fit to the original, in which only the fused layers train.
        checkpoint_steps: steps between checkpoints; None for one after each epoch.
        device: `auto`, `cpu` or `cuda`.
        seed: of a new head, the order of the data and dropout.
        resume: go on with the unfinished run in `out`, from its last checkpoint.
        progress: called as `progress(stage, done, total, loss)` after each step; stages are `layerwise` and `train`.

    Returns:
        A `FinetuneReport`, which is also in `finetune.json`.

    Raises:
        InputError: an option, the data, or a model cannot be used, or `out` is not empty; nothing has been written.
        FloatingPointError: the loss is NaN or infinite. Checkpoints stay.
    """
    started = time.perf_counter()
    settings = Settings(
        task, optimizer, learning_rate, weight_decay, warmup, epochs, batch_size, accumulation, max_length,
        distill_weight, temperature, layerwise_epochs, layerwise_learning_rate, checkpoint_steps, seed,
    )  # fmt: skip
    settings.check()
    if importlib.util.find_spec("accelerate") is None:
        raise InputError("fine-tuning needs accelerate: pip install 'mlp-fusion[train]'")
    out = output_path(out)
    _check_folder(out, resume)
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device {device!r}: use auto, cpu or cuda, and CUDA_VISIBLE_DEVICES to choose among GPUs")
    cpu = resolve_device(device).type == "cpu"
    labelled = task == "classification"
    rows = read_rows(train, labelled=labelled, columns=columns)
    held_out = None if evaluation is None else read_rows(evaluation, labelled=labelled, columns=columns)
    # Under torchrun, the first of several processes holds the folder for all.
    with taken(out) if _is_main() else contextlib.nullcontext():
        _check_folder(out, resume)
        transformers.set_seed(seed)  # before a head is drawn
        student = load_student(model, task, class_names(rows) if labelled else [], optimizer, tokenizer)
        taught = None if teacher is None else load_teacher(teacher, task, student)
        fitted = None if original is None else load_original(original, student)
        models = [student.model, taught, None if fitted is None else fitted[0]]
        length = min(max_length, *(positions(m) or max_length for m in models if m is not None))
        # A copy: the length that it cuts texts to would be saved with the tokenizer.
        reader = copy.deepcopy(student.tokenizer)

        known = _examples(rows, reader, student, length)
        wanted = None if held_out is None else _examples(held_out, reader, student, length)
        teacher_name, original_name = _name(teacher), _name(original)
        names = {"model": student.name, "teacher": teacher_name, "original": original_name}
        if _processes() > 1:
            # The first process is about to fill the folder that the others have yet to find empty.
            import accelerate

            accelerate.PartialState(cpu=cpu).wait_for_everyone()
        run = _Run(settings, student, known, wanted, out / _WORK, cpu, progress)
        data = {"training data": _digest(rows), "evaluation data": _digest(held_out), "processes": _processes()}
        run.open({**dataclasses.asdict(settings), **names, "examples": len(known), **data}, resume)
        with contextlib.ExitStack() as stack:
            for loaded in models:
                if loaded is not None:
                    stack.enter_context(naming_outputs(loaded))
            run.train(taught, fitted)

        record = fusion_record(student.model.config)
        report = FinetuneReport(
            task=task, model=student.name, teacher=teacher_name, original=original_name,
            method=None if record is None else record["method"],
            parameterization=None if record is None else record["parameterization"],
            optimizer=optimizer, learning_rate=learning_rate, batch_size=batch_size, epochs=epochs, seed=seed,
            examples=len(known), metric=_METRICS[task], initial=run.state["initial"],
            final=run.evaluations[-1] if run.evaluations else None, train=run.curve, evaluations=run.evaluations,
            distillation={
                "layerwise": run.state["layerwise"],
                "logits": None if taught is None else {"weight": distill_weight, "temperature": temperature},
            },
            seconds=time.perf_counter() - started,
        )  # fmt: skip
        if run.is_main:
            student.model.save_pretrained(out)
            student.tokenizer.save_pretrained(out)
            _write(out / RESULT_FILE, report.to_dict())
            shutil.rmtree(out / _WORK)
        return report


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


class _Run:
    """The stages of one run, and what has to outlive an interrupt."""

    def __init__(
        self, settings: Settings, student: Student, train: Any, evaluation: Any, work: Path, cpu: bool,
        progress: Progress | None,
    ) -> None:  # fmt: skip
        self.settings, self.student, self.work, self.cpu, self.progress = settings, student, work, cpu, progress
        self.examples, self.held_out = train, evaluation
        self.state: dict[str, Any] = {"settings": {}, "initial": None, "layerwise": None, "start": None}
        self.curve: list[dict[str, float]] = []
        self.evaluations: list[dict[str, float]] = []
        self.is_main = _is_main()

    def open(self, description: dict[str, Any], resume: bool) -> None:
        """Note what is run, or compare it with what an unfinished run was started with."""
        file = self.work / _STATE
        if resume and file.is_file():
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
        if self.is_main:
            _write(self.work / _STATE, self.state)

    def train(self, teacher: nn.Module | None, original: tuple[nn.Module, list[int]] | None) -> None:
        """Evaluate, distil layer by layer, train."""
        # Here, because this import needs accelerate.
        from mlp_fusion.finetuning.trainers import LayerwiseTrainer, TaskTrainer

        s, model = self.settings, self.student.model
        trainer = TaskTrainer(
            weight=s.distill_weight, temperature=s.temperature,
            **self._common("train", teacher, s.learning_rate, s.epochs, evaluate=True),
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
            with _only_trains(model, fused_parameters(model, original[1])):
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
        steps = max(1, math.ceil(math.ceil(len(self.examples) / (s.batch_size * _processes())) * epochs))
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
            report_to="none",
            disable_tqdm=True,
            log_level="error",
        )
        collator: Any = transformers.default_data_collator
        if labelled:
            # Behind the texts, where no position shifts; the tokenizer itself is saved as it was.
            padder = copy.deepcopy(self.student.tokenizer)
            padder.padding_side = "right"
            collator = transformers.DataCollatorWithPadding(padder)
        momentum = {"lr": rate, "momentum": 0.9, "weight_decay": s.weight_decay}
        return {
            "model": self.student.model,
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


class _only_trains:  # noqa: N801  (a context manager)
    """Within it, of `model` only `parameters` require gradients."""

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        kept = {id(p) for p in parameters}
        self.frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]

    def __enter__(self) -> None:
        for parameter in self.frozen:
            parameter.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        for parameter in self.frozen:
            parameter.requires_grad_(True)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint below `folder`: the trainer writes its state file last."""
    found = [p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    return max(found, key=lambda p: int(p.name.split("-")[1]), default=None)


def is_unfinished(out: Path) -> bool:
    """Whether `out` holds a run that can be resumed."""
    return (out / _WORK / _STATE).is_file()


def _check_folder(out: Path, resume: bool) -> None:
    if (out / RESULT_FILE).is_file():
        raise InputError(f"{out} holds a finished run: choose another folder")
    if resume:
        if not is_unfinished(out):
            raise InputError(f"{out} holds no unfinished run: leave out resume to start one")
    elif is_unfinished(out):
        raise InputError(f"{out} holds an unfinished run: go on with resume, or choose another folder")
    else:
        check_output(out)


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _processes() -> int:
    # As torchrun says, before anything has been set up.
    return int(os.environ.get("WORLD_SIZE", "1"))


def _digest(rows: Rows | None) -> str | None:
    if rows is None:
        return None
    return hashlib.sha256(json.dumps([rows.texts, rows.pairs, rows.labels]).encode()).hexdigest()[:16]


def _name(model: Model | None) -> str | None:
    if model is None:
        return None
    return str(model) if isinstance(model, (str, Path)) else type(model).__name__


def _write(file: Path, content: dict[str, Any]) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, file)


def _best_class(logits: Any, _: Any) -> Any:
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def _accuracy(found: Any) -> dict[str, float]:
    return {"accuracy": float((found.predictions == found.label_ids).mean())}
