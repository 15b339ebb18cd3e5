"""Results of `compress` and `finetune` as JSON, made up, and a reader of the page about them."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from mlp_fusion import DistillReport, FusionReport, SqueezeReport
from mlp_fusion.distilling import DistillSettings
from mlp_fusion.measure import FFNRow
from mlp_fusion.measure.report import CalibrationRecord, EmbeddingSimilarity
from mlp_fusion.settings import FuseSettings, fields
from mlp_fusion.squeezing import SqueezeSettings
from mlp_fusion.tuning import FinetuneSettings

#: A name that a page must escape.
EVIL = '<b>&"$x_1$'
#: Tags without an end.
VOID = {"meta", "br", "hr", "img", "link", "input"}


def fusion_report(layers: int = 3, *, old: bool = False, **changes: Any) -> dict[str, Any]:
    """The JSON of a report, with numbers that differ by layer."""
    rows = []
    for layer in range(layers):
        ntk = {kernel: {"total": start + layer / 7} for kernel, start in (("gd", 9.25), ("sign", 0.375))}
        spectrum = {
            kernel: {name: [s / rank for rank in range(1, 9)] for name, s in (("before", 0.5), ("after", 0.4))}
            for kernel in ("gd", "sign")
        }
        extra = {} if old else {"cluster_sizes": [[1, 300], [3, 5], [40, 1]], "ntk_spectrum": spectrum}
        row = FFNRow(layer, f"layer.{layer}", 1536, 384, 0.125 + layer / 9, ntk, 40, 300, 0, "ok", 1.5, **extra)  # type: ignore[arg-type]
        rows.append(row)
    asked = {field.name: changes.pop(field.name) for field in fields(FuseSettings) if field.name in changes}
    settings = FuseSettings(**{"width": 0.25, "refit": True, **asked})
    values: dict[str, Any] = {
        "model_type": "bert", "settings": settings, "parameterization": "scaled",
        "sample": "text.txt", "sample_rows": 512, "parameters_before": 22_713_216, "parameters_after": 17_400_000,
        "bytes_before": 4096, "bytes_after": 1024, "seconds": 12.0, "rows": rows,
        "embeddings": EmbeddingSimilarity(0.861, 0.7, 64),
        "calibration": CalibrationRecord(11_743, 1.0),
    }  # fmt: skip
    data = FusionReport(**{**values, **changes}).to_dict()
    if old:
        for row in data["rows"]:
            del row["cluster_sizes"], row["ntk_spectrum"]
    return data


def finetune(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """The JSON of a fine-tuning run."""
    metric = changes.get("metric", "accuracy")
    asked = {field.name: changes.pop(field.name) for field in fields(FinetuneSettings) if field.name in changes}
    known = {"task": "classification", "seed": seed, "epochs": 2.0, "learning_rate": 1e-4, "batch_size": 8, **asked}
    return {
        "format": 2, "settings": FinetuneSettings(**known).recorded(), "model": "big", "teacher": None,
        "parameterization": None, "metric": metric, "method": None, "seconds": 60.0, "original": None, "examples": 512,
        "initial": {"loss": 0.7, metric: 0.5},
        "final": {"loss": 0.25, metric: 0.8125 + seed / 16},
        "train": [
            {"step": s, "epoch": s / 5, "loss": 1 / s + seed, "learning_rate": 1e-4 / s} for s in range(1, 11)
        ],
        "evaluations": [{"step": s, "epoch": s / 5, "loss": 0.5, metric: 0.75 + seed / 16} for s in (5, 10)],
        "distillation": {"layerwise": None, "logits": None},
        **changes,
    }  # fmt: skip


def distillation(**changes: Any) -> dict[str, Any]:
    """The JSON of a distillation."""
    known = DistillSettings(recursions=2, epochs=2.0, seed=4)
    parts = {"loss": 9.5, "mlm": 6.25, "hidden": 0.75}
    report = DistillReport(
        known.recorded(), "big", [2, 4], 5_000_000, 22_000_000, 640, parts, {**parts, "loss": 3.125},
        [{"step": s, "epoch": s / 5, "loss": 10.0 - s, "learning_rate": 1e-4} for s in range(1, 11)],
        [{"step": s, "epoch": s / 5, **parts, "loss": 9.5 - s} for s in (0, 5, 10)], 90.0,
    )  # fmt: skip
    return {**report.to_dict(), **changes}


def squeezing(**changes: Any) -> dict[str, Any]:
    """The JSON of a squeezed model, of which the last round but one was written."""
    rounds = [
        {"parameters": 1000 - 100 * n, "error": n / 64, "loss": 0.5 + n / 8, "accuracy": 0.875 - n / 16, "bonds": None}
        for n in range(3)
    ]
    settings = SqueezeSettings(task="classification", max_loss=0.7)
    return {**SqueezeReport(settings.recorded(), rounds, 1, "accuracy", 1000).to_dict(), **changes}


def put(folder: Path, *, report: Any = None, run: Any = None, **others: Any) -> Path:
    """A result's folder, with what `compress` or `finetune` leaves there; `others` by the names of their files."""
    for name, content in others.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(content))
    if report is not None:
        (folder / "mlp_fusion").mkdir(parents=True)
        (folder / "mlp_fusion" / "report.json").write_text(json.dumps(report))
    if run is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "finetune.json").write_text(json.dumps(run))
    return folder


class Checker(HTMLParser):
    """Collects text, attributes and identifiers, and fails on tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]


def parse(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    return checker
