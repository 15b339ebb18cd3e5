"""`write_report`: one page about everything that was fused and fine-tuned in a folder."""

from __future__ import annotations

import importlib
import json
import os
import platform
import uuid
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

import mlp_fusion
from mlp_fusion.errors import InputError
from mlp_fusion.measure.report import finite, render
from mlp_fusion.report.gather import find_results
from mlp_fusion.report.summary import summarize

__all__ = ["WrittenReport", "write_report"]

#: Marks our own files, which may be overwritten, in the first bytes of either.
GENERATOR = "mlp-fusion report"
REPORT_FORMAT = 1
_HEAD = 1024


@dataclass(frozen=True)
class WrittenReport:
    """What :func:`write_report` wrote.

    Attributes:
        page, data: the files, HTML and JSON.
        content: of the JSON file; numbers that are not finite are null.
    """

    page: Path
    data: Path
    content: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The content of the JSON file."""
        return self.content

    def table(self) -> str:
        """The summary as text, and the files' names."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for title in ("result", "method"):
            table.add_column(title)
        for title in ("output\nerror", "NTK\nerror", "cosine", "before", "after"):
            table.add_column(title, justify="right")
        for row in self.content["summary"]:
            scores = [(row[key] or {}).get("mean") for key in ("initial", "final")]
            numbers = [row["output_error"], row["ntk_error"], row["cosine"], *scores]
            table.add_row(row["name"], row["method"] or "-", *("-" if n is None else f"{n:.3g}" for n in numbers))
        return f"{render(table)}\nwritten: {self.page}, {self.data}"


def write_report(folder: str | Path, out: str | Path | None = None, *, title: str | None = None) -> WrittenReport:
    """Write a page about every fused checkpoint and every fine-tuning run in a folder, students and squeezed models.

    The page is one HTML file that needs nothing else: errors per layer, cluster sizes, spectra of the tangent kernels,
    methods side by side, learning curves, losses over parameters. The JSON file beside it holds the numbers. The same
    results give the same bytes, whenever it is called.

    Args:
        folder: a result, or a folder of results up to two levels down; what `compress`, `finetune`,
            `distill` and `squeeze` wrote is read, no model is loaded.
        out: the page, `*.html`; the JSON file has the suffix `.json`. None: `report.html` in `folder`.
        title: of the page; None for the folder's name.

    Raises:
        InputError: nothing to report on, a damaged file, a file in the way that is no report, or matplotlib or jinja2
            is missing. Nothing is written.
    """
    folder = Path(folder).expanduser()
    for package in ("matplotlib", "jinja2"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise InputError(f"the report needs {package}: pip install 'mlp-fusion[report]'") from error
    from mlp_fusion.report.page import render_page

    page = folder / "report.html" if out is None else Path(out).expanduser()
    if page.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{page}: the page is HTML: give a name that ends in .html")
    data = page.with_suffix(".json")
    results = find_results(folder)
    for file in (page, data):
        _check_target(file)
    versions = {name: version(name) for name in ("matplotlib", "jinja2")}
    content = {
        "generator": GENERATOR,
        "format": REPORT_FORMAT,
        "title": title or f"Fused models in {folder.resolve().name}",
        "versions": {"mlp-fusion": mlp_fusion.__version__, "python": platform.python_version(), **versions},
        **summarize(results),
    }
    html = render_page(content)
    content = finite(content)
    _replace(data, json.dumps(content, indent=1, allow_nan=False) + "\n")
    _replace(page, html)
    return WrittenReport(page, data, content)


def _check_target(file: Path) -> None:
    """Raise InputError unless `file` can be written and holds nothing but an earlier report."""
    if file.is_dir() or not file.parent.is_dir():
        where = f"{file} is a folder" if file.is_dir() else f"{file.parent}: no such folder"
        raise InputError(f"{where}: choose another --out")
    if not os.access(file.parent, os.W_OK):
        raise InputError(f"{file.parent} cannot be written to: choose another --out")
    if file.exists():
        with file.open("rb") as handle:
            head = handle.read(_HEAD)
        if f'"{GENERATOR}"'.encode() not in head:
            raise InputError(f"{file} exists and is no report: choose another --out or move it away")


def _replace(file: Path, text: str) -> None:
    """Write `text` to `file` in one step: a reader sees the old content or the new."""
    staging = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        staging.write_text(text, encoding="utf-8")
        staging.replace(file)
    finally:
        staging.unlink(missing_ok=True)
