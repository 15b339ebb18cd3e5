"""`squeeze`: cut the bonds of a model's matrices round by round, and tune what is left in between."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import nn

from mlp_fusion.choices import CALIBRATION_SENTENCES
from mlp_fusion.companions.mpo import as_matrix, chain_targets
from mlp_fusion.companions.operators import mpo_decompose
from mlp_fusion.companions.squeezing import Squeezed, squeeze_bonds, stored_size
from mlp_fusion.errors import InputError
from mlp_fusion.finetuning.data import Data, read_rows
from mlp_fusion.finetuning.loading import load_for
from mlp_fusion.finetuning.result import RESULT_FILE, SQUEEZE_FILE, SQUEEZE_ROUNDS, Progress
from mlp_fusion.finetuning.run import METRICS
from mlp_fusion.finetuning.session import is_unfinished, write_json
from mlp_fusion.measure.report import finite, render
from mlp_fusion.report.figures import curves
from mlp_fusion.settings import make, takes
from mlp_fusion.squeezing import SqueezeSettings
from mlp_fusion.store.output import output_path, taken
from mlp_fusion.verbs.compress import compress
from mlp_fusion.verbs.finetune import finetune

#: In the output folder: the plot.
PLOT = "squeeze.svg"
#: Among the rounds: the model that begins with fused FFNs.
FUSED = "fused"


@dataclass(frozen=True)
class SqueezeReport:
    """The outcome of :func:`mlp_fusion.squeeze`.

    Attributes:
        settings: the options of :class:`mlp_fusion.squeezing.SqueezeSettings` that say what was done.
        rounds: entries with `parameters`, the estimated relative squared `error` of that round's cuts, `loss` and the
            task's metric on the evaluation data after the tuning, and the `bonds` by module; the first is uncut.
        chosen: number of the round that `OUT` holds.
        metric: `accuracy` or `perplexity`.
        whole: parameters of the model as it was given, which shares are of.

    Examples:
        >>> from mlp_fusion import SqueezeReport
        >>> rounds = [{"parameters": 100, "error": 0.0, "loss": 0.3, "accuracy": 0.9, "bonds": None}]
        >>> SqueezeReport({}, rounds, 0, "accuracy", 100).table().splitlines()[-1]
        '* written'
    """

    settings: dict[str, Any]
    rounds: list[dict[str, Any]] = field(default_factory=list)
    chosen: int = 0
    metric: str = ""
    whole: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        result: dict[str, Any] = finite(dataclasses.asdict(self))
        return result

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """A line per round."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for title in ("round", "parameters", "share", "estimated\nerror", "loss", self.metric):
            table.add_column(title, justify="right")
        for number, one in enumerate(self.rounds):
            mark = " *" if number == self.chosen else ""
            table.add_row(
                f"{number}{mark}", f"{one['parameters']:,}", f"{one['parameters'] / self.whole:.1%}",
                f"{one['error'] ** 0.5:.3f}", f"{one['loss']:.4f}", f"{one[self.metric]:.4f}",
            )  # fmt: skip
        return f"{render(table)}\n* written"


@takes(SqueezeSettings)
def squeeze(
    model: str | Path,
    out: str | Path,
    train: Data,
    evaluation: Data,
    *,
    columns: Sequence[str] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> SqueezeReport:
    """Make a model small by cutting the bonds of its matrices as chains of tensors, tuning what is left in between.

    Round 0 trains the whole model's small tensors; with `width`, of the model with fused FFNs, whose matrices are then
    cut: fusion and chains together. Every other round decomposes the matrices anew, cuts where the
    spectra say that it costs least until a share of the parameters is gone, and trains the small tensors again, the
    central ones frozen. It ends with the last round that has `target_parameters` or more than `max_loss` allows.

    Args:
        model: a folder or hub name.
        out: folder to make. It gets the merged model of the chosen round, its chains under `adapter`, `squeeze.json`
            and a plot, `squeeze.svg`; until then the rounds.
        train, evaluation, columns: as in :func:`mlp_fusion.finetune`; what is evaluated decides with `max_loss`.
        progress: called as `progress(stage, done, total, loss)`; stages are `round 0` and so on.
        options: the fields of :class:`mlp_fusion.squeezing.SqueezeSettings`.

    Returns:
        A `SqueezeReport`, which is also in `squeeze.json`.

    Raises:
        InputError: as :func:`mlp_fusion.finetune`, or the parameters cannot be as few as asked.

    Examples:
        >>> files = {"train": "train.tsv", "evaluation": "dev.tsv"}
        >>> report = mlp_fusion.squeeze(
        ...     "roberta-base", "squeezed", **files, task="classification", target_parameters=0.9, round_share=0.2
        ... )
        >>> report.rounds[-1]["parameters"] < report.rounds[0]["parameters"]
        True
    """
    settings = make(SqueezeSettings, options, "squeeze", ("train", "evaluation", "columns", "progress"))
    settings.check()
    out = output_path(out)
    report = _opened(out, settings)
    if not report.rounds:
        _check_target(model, settings)
    with taken(out):
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / SQUEEZE_FILE, report.to_dict())
        while not _ended(report, settings):
            number = len(report.rounds)
            before = out / SQUEEZE_ROUNDS / str(number - 1)
            plan = _cut(before, report, settings) if number else None
            if number and plan is None:
                break
            try:
                source = before if number else _first(model, out, train, columns, settings)
                found = _round(number, source, out, (train, evaluation), columns, plan, settings, progress)
            except InputError:
                if not number:
                    _forget(out)
                raise
            fused = settings.width is not None and not report.whole
            whole = report.whole or (_whole(load_for(settings.task, Path(model))) if fused else found["parameters"])
            report = dataclasses.replace(report, rounds=[*report.rounds, found], whole=whole)
            report = dataclasses.replace(report, chosen=_chosen(report, settings))
            write_json(out / SQUEEZE_FILE, report.to_dict())
        _finish(out, report)
    return report


def _check_target(model: str | Path, settings: SqueezeSettings) -> None:
    """Raise InputError for a count of parameters that the model does not exceed."""
    asked = settings.target_parameters
    if asked is None or asked < 1.0:
        return
    whole = _whole(load_for(settings.task, Path(model)))
    if asked >= whole:
        raise InputError(f"target_parameters {asked:.0f}: the model has {whole:,}, so that nothing is to be cut")


def _forget(out: Path) -> None:
    """Take away what a run has left that could not even begin."""
    (out / SQUEEZE_FILE).unlink()
    shutil.rmtree(out / SQUEEZE_ROUNDS, ignore_errors=True)


def _opened(out: Path, settings: SqueezeSettings) -> SqueezeReport:
    """What was done so far."""
    if not out.exists() or not any(out.iterdir()):
        return SqueezeReport(settings.recorded(), metric=METRICS[settings.task])
    journal = out / SQUEEZE_FILE
    if not settings.resume or not journal.is_file():
        raise InputError(f"{out} is not empty: choose another folder, or go on with an unfinished run with resume")
    known = SqueezeReport(**json.loads(journal.read_text(encoding="utf-8")))
    if not (out / SQUEEZE_ROUNDS).exists() and known.rounds:
        raise InputError(f"{out} is complete: choose another folder")
    if known.settings != settings.recorded():
        changed = sorted(n for n, value in settings.recorded().items() if known.settings.get(n) != value)
        raise InputError(f"the run in {out} had other options ({', '.join(changed)}): resume with the same")
    return known


def _first(
    model: str | Path, out: Path, train: Data, columns: Sequence[str] | None, settings: SqueezeSettings
) -> str | Path:  # fmt: skip
    """What round 0 trains: the model, or what its fusion has written."""
    if settings.width is None:
        return model
    fused = out / SQUEEZE_ROUNDS / FUSED
    if not fused.exists():
        rows = read_rows(train, labelled=False, columns=columns, limit=CALIBRATION_SENTENCES)
        text = out / SQUEEZE_ROUNDS / "calibration.txt"
        text.parent.mkdir(exist_ok=True)
        text.write_text("".join(f"{' '.join(one.split())}\n" for one in rows.texts), encoding="utf-8")
        compress(model, fused, settings.width, calibration=str(text), seed=settings.seed, device=settings.device)
    return fused


def _ended(report: SqueezeReport, settings: SqueezeSettings) -> bool:
    if not report.rounds:
        return False
    last = report.rounds[-1]
    if settings.max_loss is not None and len(report.rounds) > 1 and last["loss"] > settings.max_loss:
        return True
    return settings.target_parameters is not None and last["parameters"] <= _target(report, settings)


def _target(report: SqueezeReport, settings: SqueezeSettings) -> int:
    """Parameters to end with."""
    asked = settings.target_parameters
    if asked is None:
        return 0
    return int(asked * report.whole) if asked < 1.0 else int(asked)


def _chosen(report: SqueezeReport, settings: SqueezeSettings) -> int:
    """The last round whose loss is allowed; round 0 has what it has."""
    allowed = [
        number
        for number, one in enumerate(report.rounds)
        if number == 0 or settings.max_loss is None or one["loss"] <= settings.max_loss
    ]
    return allowed[-1]


def _cut(source: Path, report: SqueezeReport, settings: SqueezeSettings) -> Squeezed | None:
    """The next round's bonds; None where all are at 1 and only the loss was to end it.

    Raises:
        InputError: the parameters to end with are fewer than with all bonds at 1, which the first round is told.
    """
    loaded = load_for(settings.task, source)
    matrices = _matrices(loaded, settings)
    chains = {name: mpo_decompose(weight, length=settings.length) for name, weight in matrices.items()}
    before = report.rounds[-1]["bonds"] or {}
    chains = {name: chain.truncated(before[name]) if name in before else chain for name, chain in chains.items()}
    rest = sum(p.numel() for p in loaded.parameters()) - sum(weight.numel() for weight in matrices.values())
    least = rest + sum(
        stored_size(chain.shape, [t.shape[1] * t.shape[2] for t in chain.tensors], [1] * len(chain.bonds))
        for chain in chains.values()
    )
    now, target = report.rounds[-1]["parameters"], _target(report, settings)
    if settings.target_parameters is not None and target < least:
        raise InputError(f"{target:,} parameters cannot be: all bonds at 1 leave {least:,}: raise target_parameters")
    if now <= least:
        return None
    allowed = max(now - int(settings.round_share * report.whole), target, least)
    found = squeeze_bonds(chains, allowed - rest)
    return Squeezed(found.bonds, found.parameters + rest, found.error)


def _matrices(model: nn.Module, settings: SqueezeSettings) -> dict[str, torch.Tensor]:
    """Module -> its weight, which the method decomposes."""
    names = chain_targets(model, embeddings=settings.embeddings)
    return {name: as_matrix(model.get_submodule(name)) for name in names}


def _round(
    number: int, source: str | Path, out: Path, data: tuple[Data, Data], columns: Sequence[str] | None,
    plan: Squeezed | None, settings: SqueezeSettings, progress: Progress | None,
) -> dict[str, Any]:  # fmt: skip
    """Train one round, or go on with it, and say what came of it."""
    folder = out / SQUEEZE_ROUNDS / str(number)
    options = {
        "length": settings.length,
        "embeddings": settings.embeddings,
        "bond_pattern": None if plan is None else plan.bonds,
    }
    training = {
        name: getattr(settings, name)
        for name in ("task", "epochs", "learning_rate", "batch_size", "max_length", "seed", "device")
    }
    trained = folder / RESULT_FILE
    if trained.is_file():  # it ended, and the run was killed before it was noted
        final = json.loads(trained.read_text(encoding="utf-8"))["final"]
    else:
        final = finetune(
            source, folder, *data, columns=columns, peft="mpo", peft_options=options,
            progress=None if progress is None else lambda _stage, *now: progress(f"round {number}", *now),
            resume=is_unfinished(folder), **training,
        ).final  # fmt: skip
    parameters = plan.parameters if plan is not None else _whole(load_for(settings.task, folder))
    return {
        "parameters": parameters,
        "error": 0.0 if plan is None else plan.error,
        **{name: final[name] for name in ("loss", METRICS[settings.task])},
        "bonds": None if plan is None else plan.bonds,
    }


def _whole(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _finish(out: Path, report: SqueezeReport) -> None:
    """Put the chosen round into the folder and take the rounds away; what was begun is gone on with."""
    chosen = out / SQUEEZE_ROUNDS / str(report.chosen)
    for entry in sorted(chosen.iterdir()) if chosen.exists() else ():
        entry.replace(out / entry.name)
    axis = [one["parameters"] for one in report.rounds]
    losses = [one["loss"] for one in report.rounds]
    drawn = curves(
        [(0, {"x": axis, "mean": losses, "low": losses, "high": losses})],
        "parameters", "loss", f"loss against parameters of {len(axis)} rounds",
    )  # fmt: skip
    (out / PLOT).write_text(drawn, encoding="utf-8")
    shutil.rmtree(out / SQUEEZE_ROUNDS)
