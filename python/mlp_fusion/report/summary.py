"""The numbers of the page, as plain JSON types: what the page shows, its JSON holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from mlp_fusion.choices import OPTIMIZER_KERNELS
from mlp_fusion.measure import FFNRow
from mlp_fusion.report.gather import Checkpoint, Results, Run, RunGroup, Score, Squeezed, Student

#: Points of a training curve; longer ones are averaged in blocks of equal length.
CURVE_POINTS = 200

Values = dict[str, Any]


def summarize(results: Results) -> Values:
    """`summary` (a row per result), `checkpoints`, `runs` (a group of seeds each), `students` and `squeezed`."""
    checkpoints = [_checkpoint(checkpoint) for checkpoint in results.checkpoints]
    groups = [_group(group, _fused_from(group.runs[0], results.checkpoints)) for group in results.groups]
    rows = []
    for checkpoint in checkpoints:
        trained = [group for group in groups if group["checkpoint"] == checkpoint["name"]]
        rows += [_summary_row(checkpoint, group) for group in trained] or [_summary_row(checkpoint, None)]
    rows += [_summary_row(None, group) for group in groups if group["checkpoint"] is None]
    students = [_student(student) for student in results.students]
    squeezed = [_squeezed(model) for model in results.squeezed]
    for one in students:
        scores = [None if found is None else _single(found["loss"]) for found in (one["initial"], one["final"])]
        rows.append(_other_row(one["name"], "distill", one["teacher_parameters"], one["parameters"], "loss", *scores))
    for one in squeezed:
        first, last = one["rounds"][0], one["rounds"][one["chosen"]]
        scores = [_single(found["score"]) for found in (first, last)]
        rows.append(_other_row(one["name"], "squeeze", one["whole"], last["parameters"], one["metric"], *scores))
    return {
        "summary": rows, "checkpoints": checkpoints, "runs": groups, "students": students, "squeezed": squeezed,
    }  # fmt: skip


def _student(student: Student) -> Values:
    return {
        "name": student.name,
        "teacher": student.teacher,
        "layers": list(student.layers),
        "parameters": student.parameters,
        "teacher_parameters": student.teacher_parameters,
        "examples": student.examples,
        "epochs": student.settings.epochs,
        "seed": student.settings.seed,
        "start": student.settings.start,
        "learning_rate": student.settings.learning_rate,
        "initial": student.initial,
        "final": student.final,
        "seconds": student.seconds,
        "curves": {"train": _curve([student.train]), "loss": _curve([student.evaluations])},
    }


def _squeezed(model: Squeezed) -> Values:
    return {
        "name": model.name,
        "task": model.settings.task,
        "metric": model.metric,
        "whole": model.whole,
        "chosen": model.chosen,
        "curve": _curve([[(one.parameters, one.score.loss) for one in model.rounds]]),
        "rounds": [
            {
                "parameters": one.parameters, "share": one.parameters / model.whole, "error": one.error**0.5,
                "loss": one.score.loss, "score": one.score.metric,
            }
            for one in model.rounds
        ],
    }  # fmt: skip


def _single(value: float) -> dict[str, float]:
    return {"mean": value, "low": value, "high": value}


def _checkpoint(checkpoint: Checkpoint) -> Values:
    report = checkpoint.report
    kernel = OPTIMIZER_KERNELS.get(report.parameterization)
    widths = [row.neurons_after for row in report.rows]
    return {
        "name": checkpoint.name,
        "model_type": report.model_type,
        "method": report.method,
        "optimizer": report.optimizer,
        "parameterization": report.parameterization,
        "seed": report.settings.seed,
        "fused_layers": len(report.rows),
        "width_before": max(row.neurons_before for row in report.rows),
        "width_after": [min(widths), max(widths)],
        "parameters_before": report.parameters_before,
        "parameters_after": report.parameters_after,
        "output_error": fmean(row.output_error for row in report.rows),
        "kernel": kernel,
        "ntk_error": None if kernel is None else fmean(row.ntk_error[kernel]["total"] for row in report.rows),
        "cosine": None if report.embeddings is None else report.embeddings.mean,
        "smallest_cosine": None if report.embeddings is None else report.embeddings.minimum,
        "calibration": report.learnt(),
        "sample": report.sample,
        "sample_rows": report.sample_rows,
        "seconds": report.seconds,
        "layers": [_layer(row) for row in report.rows],
    }


def _layer(row: FFNRow) -> Values:
    return {
        "layer": row.layer,
        "path": row.path,
        "neurons_before": row.neurons_before,
        "neurons_after": row.neurons_after,
        "output_error": row.output_error,
        "gd_error": row.ntk_error["gd"]["total"],
        "sign_error": row.ntk_error["sign"]["total"],
        "largest_cluster": row.largest_cluster,
        "singletons": row.singletons,
        "empty_clusters": row.empty_clusters,
        "status": row.status,
        "seconds": row.seconds + row.correction_seconds,
        "cluster_bins": cluster_bins(row.cluster_sizes) if row.cluster_sizes else None,
        "ntk_spectrum": row.ntk_spectrum,
    }


def cluster_bins(sizes: Sequence[Sequence[int]]) -> list[list[int]]:
    """Cluster sizes in bins that double: triples of the smallest size, the largest, and the number of clusters.

    The bins run from 1, 2 to 3, 4 to 7 up to the largest size, without gaps; empty clusters get one of their own,
    where there are any.
    """
    counts: dict[int, int] = {}
    for size, count in sizes:
        counts[size.bit_length()] = counts.get(size.bit_length(), 0) + count
    first = 0 if counts.get(0) else 1
    return [
        [2 ** (bits - 1) if bits else 0, 2**bits - 1, counts.get(bits, 0)] for bits in range(first, max(counts) + 1)
    ]


def _fused_from(run: Run, checkpoints: Sequence[Checkpoint]) -> str | None:
    """Name of the checkpoint that `run` started from, or None.

    Paths are compared first. Results that were moved together keep the folder's name: it counts where it is the only
    one of that name and method.
    """
    for checkpoint in checkpoints:
        if checkpoint.folder.resolve() in (Path(run.model).expanduser().resolve(), run.folder.resolve()):
            return checkpoint.name
    alike = [
        checkpoint.name
        for checkpoint in checkpoints
        if checkpoint.folder.resolve().name == Path(run.model).name and checkpoint.report.method == run.method
    ]
    return alike[0] if len(alike) == 1 else None


def _group(group: RunGroup, checkpoint: str | None) -> Values:
    first = group.runs[0]
    distilled = first.distillation
    return {
        "name": group.name,
        "members": [run.name for run in group.runs],
        "seeds": [run.settings.seed for run in group.runs],
        "checkpoint": checkpoint,
        "task": first.settings.task,
        "model": first.model,
        "teacher": first.teacher,
        "method": first.method,
        "parameterization": first.parameterization,
        "optimizer": first.settings.optimizer,
        "learning_rate": first.settings.learning_rate,
        "batch_size": first.settings.batch_size,
        "examples": first.examples,
        "epochs": first.settings.epochs,
        "metric": first.metric,
        "distillation": _distillation_words(first),
        "initial": _scores([run.initial for run in group.runs], "metric"),
        "final": _scores([run.final for run in group.runs], "metric"),
        "final_loss": _scores([run.final for run in group.runs], "loss"),
        "seconds": fmean(run.seconds for run in group.runs),
        "curves": {
            "train": _curve([[(p.epoch, p.loss) for p in run.train] for run in group.runs]),
            "metric": _curve([_evaluated(run, "metric") for run in group.runs]),
            "loss": _curve([_evaluated(run, "loss") for run in group.runs]),
            "layerwise": _curve([list(run.distillation.layerwise_loss) for run in group.runs]),
        },
        "layerwise_steps": distilled.layerwise_steps,
    }


def _scores(scores: Sequence[Score | None], what: str) -> dict[str, float] | None:
    """Mean, smallest and largest `loss` or `metric`; None where nothing was evaluated."""
    known = [[float(getattr(score, what))] for score in scores if score is not None]
    return _spread(known)[0] if known else None


def _distillation_words(run: Run) -> str | None:
    distilled, done = run.distillation, []
    if distilled.layerwise_steps is not None:
        done.append(f"{distilled.layerwise_steps:,} steps layer by layer")
    if distilled.logits is not None:
        weight, temperature = distilled.logits
        done.append(f"logits (weight {weight:g}, temperature {temperature:g})")
    return ", ".join(done) or None


def _evaluated(run: Run, what: str) -> list[tuple[float, float]]:
    """Epoch and `loss` or `metric` of every evaluation, the one before training first."""
    points = [(e.epoch, float(getattr(e.score, what))) for e in run.evaluations]
    if run.initial is not None and not any(e.step == 0 for e in run.evaluations):
        points.insert(0, (0.0, float(getattr(run.initial, what))))
    return points


def _curve(runs: Sequence[Sequence[tuple[float, float]]]) -> Values | None:
    """Mean, smallest and largest value over runs at the same points, in at most `CURVE_POINTS` blocks."""
    length = min(map(len, runs))
    if length == 0:
        return None
    block = -(-length // CURVE_POINTS)
    starts = range(0, length, block)
    x = [fmean(point[0] for point in runs[0][start : start + block]) for start in starts]
    values = [[fmean(point[1] for point in run[start : start + block]) for start in starts] for run in runs]
    spreads = _spread(values)
    return {
        "block": block,
        "x": x,
        **{key: [spread[key] for spread in spreads] for key in ("mean", "low", "high")},
    }


def _spread(values: Sequence[Sequence[float]]) -> list[dict[str, float]]:
    """Per column: mean, smallest and largest over the rows."""
    columns = list(zip(*values, strict=True))
    return [{"mean": fmean(column), "low": min(column), "high": max(column)} for column in columns]


def _other_row(name: str, method: str, before: int, after: int, metric: str, initial: Any, final: Any) -> Values:
    """A row of the summary: of what is neither a fused checkpoint nor a fine-tuning."""
    row = _summary_row(None, {"name": name, "method": method, "metric": metric, "initial": initial, "final": final})
    return {**row, "run": None, "parameters_before": before, "parameters_after": after}


def _summary_row(checkpoint: Values | None, group: Values | None) -> Values:
    """A row of the summary: of a checkpoint, of one with runs that started from it, or of runs alone."""
    fused = checkpoint or {}
    run = group or {}
    keys = (
        "fused_layers", "width_before", "width_after", "parameters_before", "parameters_after", "output_error",
        "kernel", "ntk_error", "cosine", "calibration",
    )  # fmt: skip
    return {
        "name": fused.get("name", run.get("name")),
        "method": fused.get("method", run.get("method")),
        **{key: fused.get(key) for key in keys},
        "run": run.get("name"),
        "seeds": run.get("seeds"),
        "optimizer": run.get("optimizer", fused.get("optimizer")),
        **{key: run.get(key) for key in ("metric", "initial", "final")},
    }
