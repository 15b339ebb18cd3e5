"""What every training run is: stages around `transformers.Trainer`, and what has to outlive an interrupt."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import nn

from mlp_fusion.errors import InputError
from mlp_fusion.finetuning.data import Rows
from mlp_fusion.finetuning.result import RESULT_FILE, Progress
from mlp_fusion.measure.report import finite
from mlp_fusion.running.runner import naming_outputs, resolve_device
from mlp_fusion.store.output import check_output

#: Points of a learning curve.
_CURVE = 100
#: Checkpoints of an unfinished run, and what it was started with; gone when it is complete.
_WORK = "checkpoints"
_STATE = "state.json"


class Training(Protocol):
    """What a record of options says about training."""

    @property
    def epochs(self) -> float: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def accumulation(self) -> int: ...
    @property
    def warmup(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def checkpoint_steps(self) -> int | None: ...
    @property
    def seed(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def resume(self) -> bool: ...
    def recorded(self) -> dict[str, Any]: ...


class Session:
    """One run: its folder, its state, and its trainers."""

    def __init__(
        self, settings: Training, train: Any, evaluation: Any, out: Path, progress: Progress | None
    ) -> None:  # fmt: skip
        self.settings, self.out, self.progress = settings, out, progress
        self.work, self.cpu = out / _WORK, resolve_device(settings.device).type == "cpu"
        self.examples, self.held_out = train, evaluation
        self.state: dict[str, Any] = {"settings": {}, "initial": None}

    def open(self, names: dict[str, str | None], **data: Any) -> None:
        """Note what of those `names` is run on `data`, or compare it with what an unfinished run was started with."""
        if processes() > 1:
            # The first process is about to fill the folder that the others have yet to find empty.
            import accelerate

            accelerate.PartialState(cpu=self.cpu).wait_for_everyone()
        known = {"examples": len(self.examples), "processes": processes(), **data}
        description = {**self.settings.recorded(), **names, **known}
        file = self.work / _STATE
        if self.settings.resume and file.is_file():
            self.state = json.loads(file.read_text(encoding="utf-8"))
            for name, value in self.state["settings"].items():
                if description.get(name) != value:
                    now = description.get(name)
                    raise InputError(f"the unfinished run had {name} {value}, now it is {now}: resume with the same")
            return
        self.work.mkdir(parents=True, exist_ok=True)
        self.note(settings=description)

    def note(self, **known: Any) -> None:
        """Add to the state."""
        self.state.update(known)
        if is_main():
            write_json(self.work / _STATE, self.state)

    def checkpoint(self, stage: str) -> Path | None:
        """The last one of a stage."""
        return last_checkpoint(self.work / stage)

    def go(self, trainer: Any, checkpoint: Path | None) -> None:
        """Train a stage, from a checkpoint if there is one."""
        # Evaluating or resuming has used up random numbers: every stage starts from the seed.
        transformers.set_seed(self.settings.seed)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def evaluations(
        self, trainer: Any, start: dict[str, float], measure: Callable[[dict[str, float]], dict[str, float]]
    ) -> list[dict[str, Any]]:
        """What was measured on the evaluation data, from the start to the last step, as `measure` reads it."""
        if self.held_out is None:
            return []
        if not any("eval_loss" in e and e["step"] == trainer.state.global_step for e in trainer.state.log_history):
            trainer.evaluate()
        later = [e for e in trainer.state.log_history if "eval_loss" in e and e["step"] > 0]
        return [
            {"step": 0, "epoch": 0.0, **start},
            *({"step": e["step"], "epoch": e["epoch"], **measure(e)} for e in later),
        ]

    def write(self, model: Any, tokenizer: Any, report: Any, file: str) -> None:
        """Write the model, its tokenizer and, last, the report; the checkpoints of the run go."""
        if is_main():
            model.save_pretrained(self.out)
            tokenizer.save_pretrained(self.out)
            write_json(self.out / file, report.to_dict())
            shutil.rmtree(self.work)

    def arguments(self, stage: str, rate: float, epochs: float, *, evaluate: bool, predicts: bool) -> Any:
        """The trainer's arguments of a stage.

        Args:
            stage: its folder.
            rate: the learning rate at its peak.
            epochs: passes over the data.
            evaluate: after each of them.
            predicts: what is measured is made of predictions, and not of the loss alone.
        """
        s = self.settings
        steps = max(1, math.ceil(math.ceil(len(self.examples) / (s.batch_size * processes())) * epochs))
        by_steps = s.checkpoint_steps is not None
        return transformers.TrainingArguments(
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
            prediction_loss_only=not predicts,
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


def learning_curve(trainer: Any) -> list[dict[str, float]]:
    """Entries with step, epoch, loss and learning rate."""
    keys = ("step", "epoch", "loss", "learning_rate")
    return [{key: e[key] for key in keys} for e in trainer.state.log_history if "loss" in e]


@contextlib.contextmanager
def with_named_outputs(models: Iterable[nn.Module]) -> Iterator[None]:
    """Within it, all of them give outputs with names."""
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(naming_outputs(model))
        yield


@contextlib.contextmanager
def only_trains(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
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


def check_folder(out: Path, resume: bool, result: str = RESULT_FILE) -> None:
    """Raise InputError unless a run can begin in `out`, or go on there; `result` is the file that ends it."""
    if (out / result).is_file():
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


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write the file at once, as strict JSON."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, file)
