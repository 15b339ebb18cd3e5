"""What training runs did, for people (`table`) and for programs (`to_dict`, finetune.json and distill.json)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mlp_fusion.measure.report import finite

#: Called as `progress(stage, done, total, loss)` with optimiser steps; `loss` is None until there is one.
Progress = Callable[[str, int, int, float | None], None]

#: File in the output folder. It is written last: where it is, the run is complete.
RESULT_FILE = "finetune.json"
#: The same of a distillation.
DISTILL_FILE = "distill.json"
#: The same of a squeezing, which is there from its first round on; and the rounds of an unfinished one.
SQUEEZE_FILE, SQUEEZE_ROUNDS = "squeeze.json", "rounds"
#: Folder in it for what a method of peft has trained.
ADAPTER_FOLDER = "adapter"
FORMAT_VERSION = 2
DISTILL_FORMAT_VERSION = 1


@dataclass(frozen=True)
class FinetuneReport:
    """The outcome of :func:`mlp_fusion.finetune`.

    Attributes:
        settings: the options of :class:`mlp_fusion.tuning.FinetuneSettings` that say what was done.
        model, teacher, original: names or folders; None where there was none.
        method, parameterization: of the fusion; None for a model that is not fused.
        examples: training rows (blocks, for language modelling).
        metric: `accuracy` (share of right answers) or `perplexity`.
        initial: `loss` and the metric before any training; None without evaluation data.
        final: the same at the end.
        train: learning curve, entries with `step`, `epoch`, `loss`, `learning_rate`.
        evaluations: entries with `step`, `epoch`, `loss` and the metric, the first at step 0 (after the layer-wise
            distillation, if any).
        distillation: `layerwise` (`steps`, `loss` as pairs of step and mean loss) and `logits` (`weight`,
            `temperature`), each None where it was not used.
        seconds: wall-clock time of the call that finished the run.

    Examples:
        >>> files = {"train": "train.tsv", "evaluation": "dev.tsv"}
        >>> report = mlp_fusion.finetune("roberta-base", "trained", **files, task="classification", epochs=1)
        >>> report.metric, report.settings["epochs"], 0 <= report.final["accuracy"] <= 1
        ('accuracy', 1, True)
        >>> print(report)
        classification: ...
    """

    settings: dict[str, Any]
    model: str
    teacher: str | None
    original: str | None
    method: str | None
    parameterization: str | None
    examples: int
    metric: str
    initial: dict[str, float] | None
    final: dict[str, float] | None
    train: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    distillation: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    format: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, null for numbers that are not finite."""
        result: dict[str, Any] = finite(dataclasses.asdict(self))
        return result

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """The outcome as lines of text."""
        s = self.settings
        lines = [f"{s['task']}: {self.examples:,} rows, {s['epochs']:g} epochs, {s['optimizer']}, seed {s['seed']}"]
        if self.parameterization is not None:
            lines.append(f"fused model, parameterization {self.parameterization}")
        for name, found in (("before", self.initial), *((f"step {e['step']}", e) for e in self.evaluations)):
            if found is not None:
                lines.append(f"{name}: {self.metric} {_shown(self.metric, found)}, loss {found['loss']:.4f}")
        lines.append(f"{self.seconds:.0f} s")
        return "\n".join(lines)


@dataclass(frozen=True)
class DistillReport:
    """The outcome of :func:`mlp_fusion.distill`.

    Attributes:
        settings: the options of :class:`mlp_fusion.distilling.DistillSettings` that say what was done, defaults that
            depend on the teacher filled in.
        teacher: its name or folder.
        layers: the teacher's layer, from 1, that each recursion learnt from.
        parameters, teacher_parameters: of the two encoders, without their heads.
        examples: blocks of text.
        initial: before any training, on the evaluation data: the weighted `loss`, `mlm`, the mean cross-entropy of the
            masked tokens, and `attention`, `hidden` and `output`, those of them that weigh anything; None without.
        final: the same at the end.
        train: learning curve, entries with `step`, `epoch`, `loss`, `learning_rate`.
        evaluations: entries with `step`, `epoch` and what `initial` has, the first at step 0.
        seconds: wall-clock time of the call that finished the run.

    Examples:
        >>> from mlp_fusion import DistillReport
        >>> said = {"settings": {"epochs": 1.0, "seed": 0}, "teacher": "roberta-base", "layers": [2, 4, 6]}
        >>> print(DistillReport(**said, parameters=10, teacher_parameters=40, examples=8, initial=None, final=None))
        3 recursions learn from layers 2, 4, 6 of roberta-base: 10 of 40 parameters without heads
        8 blocks, 1 epochs, seed 0
        0 s
    """

    settings: dict[str, Any]
    teacher: str
    layers: list[int]
    parameters: int
    teacher_parameters: int
    examples: int
    initial: dict[str, float] | None
    final: dict[str, float] | None
    train: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    format: int = DISTILL_FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, null for numbers that are not finite."""
        result: dict[str, Any] = finite(dataclasses.asdict(self))
        return result

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """The outcome as lines of text."""
        s, learnt = self.settings, ", ".join(map(str, self.layers))
        lines = [
            f"{len(self.layers)} recursions learn from layers {learnt} of {self.teacher}: {self.parameters:,} of "
            f"{self.teacher_parameters:,} parameters without heads",
            f"{self.examples:,} blocks, {s['epochs']:g} epochs, seed {s['seed']}",
        ]
        for found in self.evaluations:
            parts = [f"{name} {value:.4f}" for name, value in found.items() if name not in ("step", "epoch")]
            lines.append(f"step {found['step']}: {', '.join(parts)}")
        lines.append(f"{self.seconds:.0f} s")
        return "\n".join(lines)


def _shown(metric: str, values: dict[str, float]) -> str:
    value = values[metric]
    return f"{value:.2%}" if metric == "accuracy" else f"{value:.3f}"
