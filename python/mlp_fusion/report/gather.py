"""Find what `compress`, `finetune`, `distill` and `squeeze` wrote below a folder, and read it.

Nothing is loaded or drawn here.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlp_fusion.distilling import DistillSettings
from mlp_fusion.errors import InputError
from mlp_fusion.finetuning import result
from mlp_fusion.measure import FusionReport
from mlp_fusion.measure import report as fusion
from mlp_fusion.measure.errors import KERNELS
from mlp_fusion.settings import FuseSettings, Settings
from mlp_fusion.squeezing import SqueezeSettings
from mlp_fusion.store.record import REPORT_FILE
from mlp_fusion.tuning import FinetuneSettings

#: Levels of folders below the given one that are searched.
DEPTH = 2


@dataclass(frozen=True)
class Checkpoint:
    """A fused checkpoint: its name (the path below the folder that was searched), its folder and its report."""

    name: str
    folder: Path
    report: FusionReport


@dataclass(frozen=True)
class Score:
    """Loss and metric of one evaluation."""

    loss: float
    metric: float


@dataclass(frozen=True)
class TrainPoint:
    """Mean training loss since the point before, and the learning rate."""

    step: int
    epoch: float
    loss: float
    learning_rate: float


@dataclass(frozen=True)
class Evaluation:
    """An evaluation during training."""

    step: int
    epoch: float
    score: Score


@dataclass(frozen=True)
class Distillation:
    """How a run learnt from the original model.

    Attributes:
        layerwise_steps: steps of matching hidden states before the task was trained; None without.
        layerwise_loss: step and mean loss of that phase.
        logits: weight and temperature of the loss on logits; None without.
    """

    layerwise_steps: int | None = None
    layerwise_loss: tuple[tuple[int, float], ...] = ()
    logits: tuple[float, float] | None = None


@dataclass(frozen=True)
class Run:
    """A fine-tuning run, as its `FinetuneReport` tells it; `name` and `folder` as of a :class:`Checkpoint`."""

    name: str
    folder: Path
    settings: FinetuneSettings
    model: str
    teacher: str | None
    original: str | None
    method: str | None
    parameterization: str | None
    examples: int
    metric: str
    initial: Score | None
    final: Score | None
    train: tuple[TrainPoint, ...]
    evaluations: tuple[Evaluation, ...]
    distillation: Distillation
    seconds: float

    def alike(self) -> tuple[Any, ...]:
        """Everything but the seed and what came of it. The steps count: they tell schedules apart."""
        d = self.distillation
        return (
            dataclasses.replace(self.settings, seed=0), self.model, self.teacher, self.original, self.method,
            self.parameterization, self.examples, self.metric, self.initial is None, self.final is None,
            tuple((p.step, p.learning_rate) for p in self.train),
            tuple(e.step for e in self.evaluations), d.layerwise_steps,
            tuple(step for step, _ in d.layerwise_loss),
            d.logits,
        )  # fmt: skip


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ in nothing but the seed, by rising seed."""

    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        """What the runs' names begin with in common; the first one's where that is nothing."""
        names = [run.name for run in self.runs]
        if len(names) == 1:
            return names[0]
        # Characters are meant, not folders: run-seed1, run-seed2.
        return os.path.commonprefix(names).rstrip("-_./ ") or names[0]  # noqa: RUF071


@dataclass(frozen=True)
class Student:
    """A distilled student, as its `DistillReport` tells it; `name` as of a :class:`Checkpoint`.

    Attributes:
        initial, final: part of the loss -> its value before any training, and at the end; None without evaluation data.
        train, evaluations: epoch and weighted loss.
    """

    name: str
    settings: DistillSettings
    teacher: str
    layers: tuple[int, ...]
    parameters: int
    teacher_parameters: int
    examples: int
    initial: dict[str, float] | None
    final: dict[str, float] | None
    train: tuple[tuple[float, float], ...]
    evaluations: tuple[tuple[float, float], ...]
    seconds: float


@dataclass(frozen=True)
class Round:
    """A round of squeezing: parameters, estimated relative squared error of its cuts, and score after the tuning."""

    parameters: int
    error: float
    score: Score


@dataclass(frozen=True)
class Squeezed:
    """A squeezed model, as its `SqueezeReport` tells it; `name` as of a :class:`Checkpoint`.

    Attributes:
        metric: of the scores.
        whole: parameters of the model as it was given.
        rounds: the first is uncut.
        chosen: number of the one that was written.
    """

    name: str
    settings: SqueezeSettings
    metric: str
    whole: int
    rounds: tuple[Round, ...]
    chosen: int


@dataclass(frozen=True)
class Results:
    """Everything that was found below `folder`, sorted by name."""

    folder: Path
    checkpoints: tuple[Checkpoint, ...]
    groups: tuple[RunGroup, ...]
    students: tuple[Student, ...] = ()
    squeezed: tuple[Squeezed, ...] = ()


def find_results(folder: Path) -> Results:
    """Read every fused checkpoint, run, student and squeezed model in `folder` and in two levels below it.

    Raises:
        InputError: no such folder, nothing found, or a file that is damaged or of a later version.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    checkpoints, runs, students, squeezed = [], [], [], []
    for found in _folders(folder, DEPTH):
        name = folder.resolve().name if found == folder else found.relative_to(folder).as_posix()
        if (found / REPORT_FILE).is_file():
            checkpoints.append(Checkpoint(name, found, read_fusion_report(found / REPORT_FILE)))
        if (found / result.DISTILL_FILE).is_file():
            students.append(read_student(found / result.DISTILL_FILE, name))
        if (found / result.SQUEEZE_FILE).is_file():
            if not (found / result.SQUEEZE_ROUNDS).exists():
                squeezed.append(read_squeezed(found / result.SQUEEZE_FILE, name))
        elif (found / result.RESULT_FILE).is_file():
            runs.append(read_run(found / result.RESULT_FILE, name))
    if not (checkpoints or runs or students or squeezed):
        raise InputError(
            f"{folder}: neither {REPORT_FILE} (written by compress) nor {result.RESULT_FILE} (by finetune), "
            f"{result.DISTILL_FILE} (by distill) or {result.SQUEEZE_FILE} (by squeeze) in it or within {DEPTH} levels "
            "below: name the folder that holds the results"
        )
    return Results(
        folder, tuple(sorted(checkpoints, key=lambda c: c.name)), group_runs(runs), tuple(students), tuple(squeezed)
    )


def _folders(folder: Path, depth: int) -> Iterable[Path]:
    """`folder` and the visible folders below it, to `depth` levels, but for the rounds of an unfinished squeezing."""
    yield folder
    if depth:
        hidden = {result.SQUEEZE_ROUNDS} if (folder / result.SQUEEZE_FILE).is_file() else set()
        for child in sorted(folder.iterdir()):
            if child.is_dir() and not child.name.startswith(".") and child.name not in hidden:
                yield from _folders(child, depth - 1)


def group_runs(runs: Iterable[Run]) -> tuple[RunGroup, ...]:
    """Put runs together that share everything but the seed; groups by name."""
    together: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        together.setdefault(run.alike(), []).append(run)
    groups = [RunGroup(tuple(sorted(group, key=lambda r: (r.settings.seed, r.name)))) for group in together.values()]
    return tuple(sorted(groups, key=lambda g: (g.name, g.runs[0].name)))


def read_fusion_report(file: Path) -> FusionReport:
    """The report that `compress` wrote to `file`.

    Raises:
        InputError: unreadable or damaged.
    """
    data = _Record(file, _read_json(file))
    _check_format(data, fusion.FORMAT_VERSION)
    try:
        report = FusionReport.from_dict(data.content)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: damaged ({error}): compress again") from error
    for name in ("parameters_before", "parameters_after", "sample_rows"):
        data.integer(name)
    for name in ("model_type", "parameterization", "sample"):
        data.text(name)
    data.number("seconds")
    _settings(data, FuseSettings)
    if report.embeddings is not None:
        for name in ("mean", "minimum"):
            data.record("embeddings").measured(name)
    if report.calibration is not None:
        data.record("calibration").integer("tokens")
    for row in data.records("rows"):
        _check_row(row)
    if not report.rows:
        raise data.damage("no FFN in 'rows'")
    return report


def _check_format(data: _Record, known: int) -> None:
    """Raise InputError unless the file has the format `known`; the first one had no number in every file."""
    found = data.integer("format") if data.has("format") else 1
    if found != known:
        remedy = "update mlp-fusion" if found > known else "it is of an earlier version, make it again"
        raise InputError(f"{data.file}: format {found} is not known, only {known}: {remedy}")


def _check_row(row: _Record) -> None:
    """Raise InputError unless the entries that are drawn have their types."""
    for name in ("layer", "neurons_before", "neurons_after"):
        row.integer(name)
    row.measured("output_error")
    row.number("seconds")
    if "correction_seconds" in row.content:
        row.number("correction_seconds")
    row.text("path")
    row.text("status")
    for name in ("largest_cluster", "singletons", "empty_clusters"):
        if row.content[name] is not None:
            row.integer(name)
    errors = row.record("ntk_error")
    for name in KERNELS:
        errors.record(name).measured("total")
    for pair in row.content.get("cluster_sizes") or []:
        if not isinstance(pair, list) or len(pair) != 2 or not all(type(n) is int and n >= 0 for n in pair):
            raise row.damage(f"'cluster_sizes' holds {pair!r}")
    if row.content.get("ntk_spectrum") is not None:
        spectra = row.record("ntk_spectrum")
        for kernel in spectra.content:
            for name in ("before", "after"):
                spectra.record(kernel).numbers(name)


def read_run(file: Path, name: str) -> Run:
    """The fine-tuning run in `file`.

    Raises:
        InputError: unreadable, damaged, or of a later version.
    """
    data = _Record(file, _read_json(file))
    _check_format(data, result.FORMAT_VERSION)
    metric = data.text("metric")
    settings = _settings(data, FinetuneSettings)

    def score(record: _Record) -> Score:
        return Score(record.measured("loss"), record.measured(metric))

    return Run(
        name=name,
        folder=file.parent,
        settings=settings,
        model=data.text("model"),
        teacher=data.optional_text("teacher"),
        original=data.optional_text("original"),
        method=data.optional_text("method"),
        parameterization=data.optional_text("parameterization"),
        examples=data.integer("examples"),
        metric=metric,
        initial=score(data.record("initial")) if data.has("initial") else None,
        final=score(data.record("final")) if data.has("final") else None,
        train=tuple(
            TrainPoint(p.integer("step"), p.number("epoch"), p.measured("loss"), p.number("learning_rate"))
            for p in data.records("train")
        ),
        evaluations=tuple(
            Evaluation(e.integer("step"), e.number("epoch"), score(e)) for e in data.records("evaluations")
        ),
        distillation=_read_distillation(data.record("distillation")) if data.has("distillation") else Distillation(),
        seconds=data.number("seconds"),
    )


def read_student(file: Path, name: str) -> Student:
    """The distillation in `file`.

    Raises:
        InputError: unreadable, damaged, or of a later version.
    """
    data = _Record(file, _read_json(file))
    _check_format(data, result.DISTILL_FORMAT_VERSION)
    settings = _settings(data, DistillSettings)
    layers = data.entries("layers")
    if not layers or not all(type(layer) is int for layer in layers):
        raise data.damage(f"'layers' is {layers!r}")

    def parts(key: str) -> dict[str, float] | None:
        return {part: data.record(key).measured(part) for part in data.record(key).content} if data.has(key) else None

    def curve(key: str) -> tuple[tuple[float, float], ...]:
        return tuple((point.number("epoch"), point.measured("loss")) for point in data.records(key))

    return Student(
        name, settings, data.text("teacher"), tuple(layers), data.integer("parameters"),
        data.integer("teacher_parameters"), data.integer("examples"), parts("initial"), parts("final"), curve("train"),
        curve("evaluations"), data.number("seconds"),
    )  # fmt: skip


def read_squeezed(file: Path, name: str) -> Squeezed:
    """The rounds in `file`.

    Raises:
        InputError: unreadable or damaged.
    """
    data = _Record(file, _read_json(file))
    settings, metric = _settings(data, SqueezeSettings), data.text("metric")
    rounds = tuple(
        Round(one.integer("parameters"), one.number("error"), Score(one.measured("loss"), one.measured(metric)))
        for one in data.records("rounds")
    )
    chosen = data.integer("chosen")
    if not 0 <= chosen < len(rounds):
        raise data.damage(f"'chosen' is {chosen} of {len(rounds)} rounds")
    return Squeezed(name, settings, metric, data.integer("whole"), rounds, chosen)


def _settings(data: _Record, record: type[Settings]) -> Any:
    """The options in a report, checked as those of a call are."""
    try:
        settings = record(**data.record("settings").content)
        settings.check()
    except (TypeError, InputError) as error:
        raise data.damage(f"'settings': {error}") from error
    return settings


def _read_distillation(data: _Record) -> Distillation:
    steps, losses, logits = None, [], None
    if data.has("layerwise"):
        layerwise = data.record("layerwise")
        steps = layerwise.integer("steps")
        for pair in layerwise.entries("loss"):
            if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) is not int or not _is_number(pair[1]):
                raise layerwise.damage(f"'loss' holds {pair!r}")
            losses.append((pair[0], float(pair[1])))
    if data.has("logits"):
        record = data.record("logits")
        logits = (record.number("weight"), record.number("temperature"))
    return Distillation(steps, tuple(losses), logits)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{file}: damaged or cut short ({error}): write it again or remove it") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class _Record:
    """A JSON object of `file`, whose entries are checked as they are read."""

    def __init__(self, file: Path, content: Any) -> None:
        self.file = file
        if not isinstance(content, dict):
            raise self.damage(f"an object is expected, not {content!r}")
        self.content: dict[str, Any] = content

    def damage(self, what: str) -> InputError:
        """The error that says what is wrong."""
        return InputError(f"{self.file}: damaged: {what[:200]}: write it again or remove it")

    def has(self, key: str) -> bool:
        return self.content.get(key) is not None

    def number(self, key: str) -> float:
        value = self.content.get(key)
        if not _is_number(value):
            raise self.damage(f"{key!r} is {value!r}, not a number")
        return float(value)  # type: ignore[arg-type]

    def measured(self, key: str) -> float:
        """A number, or NaN for null, which stands for what JSON cannot hold."""
        return math.nan if key in self.content and self.content[key] is None else self.number(key)

    def integer(self, key: str) -> int:
        value = self.content.get(key)
        if type(value) is not int:
            raise self.damage(f"{key!r} is {value!r}, not an integer")
        return value

    def text(self, key: str) -> str:
        value = self.content.get(key)
        if not isinstance(value, str):
            raise self.damage(f"{key!r} is {value!r}, not a text")
        return value

    def optional_text(self, key: str) -> str | None:
        return self.text(key) if self.has(key) else None

    def entries(self, key: str) -> list[Any]:
        value = self.content.get(key)
        if not isinstance(value, list):
            raise self.damage(f"{key!r} is {value!r}, not a list")
        return value

    def numbers(self, key: str) -> list[float]:
        values = self.entries(key)
        if not all(_is_number(value) for value in values):
            raise self.damage(f"{key!r} holds something that is not a number")
        return values

    def record(self, key: str) -> _Record:
        return _Record(self.file, self.content.get(key))

    def records(self, key: str) -> list[_Record]:
        return [_Record(self.file, entry) for entry in self.entries(key)]
