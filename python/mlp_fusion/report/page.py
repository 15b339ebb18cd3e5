"""The page: the summary's numbers in words and tables, with their figures, put into `template.html`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mlp_fusion.report import figures

Values = dict[str, Any]

#: Kernel -> its name in words.
KERNEL_NAMES = {"gd": "gradient descent", "sign": "sign descent (Adam)"}
_NONE = "–"


def render_page(content: Values) -> str:
    """The HTML page of what `write_report` gathered."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=format_number, count=format_count, short=format_short, width=format_width, score=format_score,
        seconds=format_seconds,
    )  # fmt: skip
    checkpoints = content["checkpoints"]
    return environment.get_template("template.html").render(
        **content,
        kernel_names=KERNEL_NAMES,
        comparison=_comparison(checkpoints) if len(checkpoints) > 1 else None,
        details=[_details(checkpoint, number) for number, checkpoint in enumerate(checkpoints)],
        error_keys=_keys(("outputs", "kernel of gradient descent", "kernel of sign descent (Adam)")),
        spectrum_keys=[
            {**key, "marker": ""} | {"line": line}
            for key, line in zip(_keys(("original", "fused")), ("solid", "dashed"), strict=True)
        ],
        learning=_learning(content["runs"]),
        taught=_taught(content["students"]),
        cut=_cut(content["squeezed"]),
    )


def format_number(value: float | None) -> str:
    """Three digits, or a dash where there is no number."""
    if value is None:
        return _NONE
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def format_count(value: int | None) -> str:
    """A whole number with its thousands apart."""
    return _NONE if value is None else f"{value:,}"


def format_seconds(value: float) -> str:
    """A duration as people say it."""
    if value < 120:
        return f"{value:.3g} s"
    return f"{value / 60:.3g} min" if value < 7200 else f"{value / 3600:.3g} h"


def format_width(value: Sequence[int]) -> str:
    """The narrowest and the widest, or the one width."""
    low, high = value
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def format_short(value: int) -> str:
    """A number of parameters in thousands, millions or billions."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(value)


def format_score(value: float | None) -> str:
    """A metric or a loss: four digits, for accuracies that differ in the third."""
    return format_number(value) if value is None or not math.isfinite(value) else f"{value:.4g}"


def _keys(labels: Sequence[str]) -> list[dict[str, str]]:
    return [{"label": label, **figures.series_key(number)} for number, label in enumerate(labels)]


def _comparison(checkpoints: Sequence[Values]) -> Values:
    tables = [("Relative error of the outputs", _heat_table(checkpoints, lambda _: "output_error"))]
    dots = [Markup(figures.comparison(checkpoints, "output", "comparison-output"))]
    if any(checkpoint["kernel"] for checkpoint in checkpoints):
        own = _heat_table(checkpoints, lambda c: c["kernel"] and f"{c['kernel']}_error")
        tables.append(("Relative error of the kernel of each one's optimizer", own))
        dots.append(Markup(figures.comparison(checkpoints, "ntk", "comparison-ntk")))
    return {"dots": dots, "tables": tables}


def _heat_table(checkpoints: Sequence[Values], key_of: Any) -> Values:
    """Numbers per checkpoint and layer, each with the strength of its colour: 0 the smallest, 1 the largest, by log."""
    columns = sorted({row["layer"] for checkpoint in checkpoints for row in checkpoint["layers"]})
    found: list[list[float | None]] = []
    for checkpoint in checkpoints:
        key = key_of(checkpoint)
        values = {row["layer"]: row[key] for row in checkpoint["layers"]} if key else {}
        found.append([values.get(layer) for layer in columns])
    logs = [math.log(v) for row in found for v in row if v is not None and math.isfinite(v) and v > 0]
    low, high = min(logs, default=0.0), max(logs, default=0.0)

    def heat(value: float | None) -> float:
        if value is None or math.isnan(value) or value <= 0:
            return 0.0
        if math.isinf(value):
            return 1.0
        return (math.log(value) - low) / (high - low) if high > low else 0.0

    rows = [
        {"name": checkpoint["name"], "cells": [(format_number(v), round(0.06 + 0.49 * heat(v), 3)) for v in row]}
        for checkpoint, row in zip(checkpoints, found, strict=True)
    ]
    return {"columns": columns, "rows": rows}


def _details(checkpoint: Values, number: int) -> Values:
    """A checkpoint with its figures; None for those that its report has no data for."""
    layers, name = checkpoint["layers"], f"c{number}"
    clustered = [row for row in layers if row["cluster_bins"]]
    drawn = {}
    for kernel in KERNEL_NAMES:
        known = [row for row in layers if row["ntk_spectrum"] and kernel in row["ntk_spectrum"]]
        drawn[kernel] = Markup(figures.spectra(known, kernel, name)) if known else None
    return {
        **checkpoint,
        "anchor": name,
        "errors": Markup(figures.errors_by_layer(layers, name)),
        "clusters": Markup(figures.cluster_sizes(clustered, name)) if clustered else None,
        "spectra": drawn,
    }


def _learning(runs: Sequence[Values]) -> list[Values]:
    """Charts of the runs that can be compared: those of one task and metric."""
    kinds = sorted({(run["task"], run["metric"]) for run in runs})
    charts = []
    for number, (task, metric) in enumerate(kinds):
        members = [run for run in runs if (run["task"], run["metric"]) == (task, metric)]
        drawn = []
        parts = [
            ("train", "epoch", "training loss", "Training loss (nats) over epochs"),
            ("metric", "epoch", metric, f"{metric.capitalize()} on the evaluation data over epochs"),
            ("loss", "epoch", "evaluation loss", "Loss (nats) on the evaluation data over epochs"),
            ("layerwise", "step", "mean squared difference",
             "Layer-by-layer distillation: mean squared difference of hidden states over steps"),
        ]  # fmt: skip
        for part, x_label, y_label, caption in parts:
            shown = [(index, run["curves"][part]) for index, run in enumerate(members) if run["curves"][part]]
            if shown and any(len(curve["x"]) > 1 for _, curve in shown):
                svg = figures.curves(shown, x_label, y_label, f"curves-{number}-{part}")
                blocks = max(curve["block"] for _, curve in shown)
                drawn.append({"svg": Markup(svg), "caption": caption, "block": blocks, "part": part})
        charts.append({
            "task": task, "metric": metric, "runs": members, "charts": drawn,
            "several": any(len(run["seeds"]) > 1 for run in members),
            "keys": _keys([run["name"] for run in members]),
        })  # fmt: skip
    return charts


def _taught(students: Sequence[Values]) -> Values | None:
    """Charts of the students, and the parts of the loss that any of them was measured on."""
    if not students:
        return None
    parts = dict.fromkeys(part for student in students for part in student["initial"] or {})
    drawn = []
    for curve, caption in (("train", "Training loss over epochs"), ("loss", "Loss on the evaluation data over epochs")):
        shown = [(number, one["curves"][curve]) for number, one in enumerate(students) if one["curves"][curve]]
        if any(len(found["x"]) > 1 for _, found in shown):
            svg = figures.curves(shown, "epoch", "loss", f"students-{curve}")
            drawn.append({"svg": Markup(svg), "caption": caption})
    return {"parts": list(parts), "charts": drawn, "keys": _keys([student["name"] for student in students])}


def _cut(models: Sequence[Values]) -> list[Values]:
    """A chart for the squeezed models of each task."""
    kinds = []
    for number, (task, metric) in enumerate(sorted({(model["task"], model["metric"]) for model in models})):
        own = [model for model in models if (model["task"], model["metric"]) == (task, metric)]
        shown = [(index, model["curve"]) for index, model in enumerate(own)]
        svg = Markup(figures.curves(shown, "parameters", "loss", f"squeezed-{number}"))
        keys = _keys([model["name"] for model in own])
        kinds.append({"task": task, "metric": metric, "models": own, "svg": svg, "keys": keys})
    return kinds
