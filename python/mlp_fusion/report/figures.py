"""The plots, as SVG elements to put into a page. The same numbers give the same bytes.

Text, axes and grid take the page's colour (`currentColor`), the background is clear, and the data's colours are seen on
white and on black alike: one drawing serves light and dark pages. Series are told apart by marker and dash as well.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib.style
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

Values = dict[str, Any]

#: Stands for the page's text colour until the drawing is text.
_INK = "#0a0b0c"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mlp-fusion",
    # A dollar sign in a folder's name is no formula.
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.alpha": 0.16,
    "grid.linewidth": 0.8,
    "axes.linewidth": 0.8,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    "grid.color": _INK,
}
#: Colour, marker and dashes of series; beyond the sixth colour the dashes change. The page's keys show the same.
_COLORS = ("#2f7fc1", "#d9730d", "#22936a", "#a05fd0", "#d1495b", "#7d8590")
_MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"))
_DASHES = (("-", "solid"), ("--", "dashed"), (":", "dotted"))
#: Inches; one column of a page, and still legible on a phone.
_WIDTH = 4.6
_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"


def series_key(number: int) -> dict[str, str]:
    """Colour, marker and line of series `number` for a key in the page."""
    dashes = _DASHES[number // len(_COLORS) % len(_DASHES)][1]
    return {"color": _COLORS[number % len(_COLORS)], "marker": _MARKERS[number % len(_MARKERS)][1], "line": dashes}


def _series(number: int) -> Values:
    return {
        "color": _COLORS[number % len(_COLORS)],
        "marker": _MARKERS[number % len(_MARKERS)][0],
        "linestyle": _DASHES[number // len(_COLORS) % len(_DASHES)][0],
        "markersize": 4.5,
        "linewidth": 1.4,
    }


def errors_by_layer(layers: Sequence[Values], name: str) -> str:
    """Relative errors of outputs and of both kernels over the layers, on a logarithmic axis."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        x = [row["layer"] for row in layers]
        for number, key in enumerate(("output_error", "gd_error", "sign_error")):
            axes.plot(x, [_positive(row[key]) for row in layers], **_series(number))
        _log_scale(
            axes.yaxis, [_positive(row[k]) for row in layers for k in ("output_error", "gd_error", "sign_error")]
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(min(x) - 0.4, max(x) + 0.4)
        axes.set_xlabel("layer")
        axes.set_ylabel("relative error")
        axes.grid(axis="y")

    return _draw(draw, (_WIDTH, 2.9), f"errors-{name}", f"Line plot of the errors of {name} over its layers")


def comparison(checkpoints: Sequence[Values], measure: str, name: str) -> str:
    """One row per checkpoint: its layers as small marks, their mean as a large one, on a logarithmic axis.

    `measure` is `output` or `ntk`; checkpoints without the measure have an empty row.
    """

    def values(checkpoint: Values) -> tuple[list[float], float]:
        if measure == "output":
            return [row["output_error"] for row in checkpoint["layers"]], checkpoint["output_error"]
        if checkpoint["kernel"] is None:
            return [], math.nan
        return [row[f"{checkpoint['kernel']}_error"] for row in checkpoint["layers"]], checkpoint["ntk_error"]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        seen: list[float] = []
        for number, checkpoint in enumerate(checkpoints):
            layers, mean = values(checkpoint)
            marks = [_positive(value) for value in layers]
            seen += marks
            color = _COLORS[0] if checkpoint["kernel"] != "gd" or measure == "output" else _COLORS[1]
            axes.plot(marks, [number] * len(marks), "|", color=color, markersize=9, alpha=0.75)
            axes.plot([_positive(mean)], [number], "o", color=color, markersize=6.5)
            axes.annotate(
                _shorten(checkpoint["name"], 46), (0, number), xycoords=("axes fraction", "data"),
                xytext=(2, 8), textcoords="offset points", fontsize=8.5,
            )  # fmt: skip
            axes.axhline(number, color=_INK, alpha=0.16, linewidth=0.8, zorder=0)
        _log_scale(axes.xaxis, seen)
        axes.set_ylim(len(checkpoints) - 0.55, -0.85)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("relative error of the outputs" if measure == "output" else "relative error of the kernel")
        axes.grid(axis="x")

    what = "output errors" if measure == "output" else "kernel errors"
    return _draw(draw, (_WIDTH, 0.75 + 0.42 * len(checkpoints)), name, f"Dot plot of {what}, a row per checkpoint")


def cluster_sizes(layers: Sequence[Values], name: str) -> str:
    """A histogram per layer: clusters over size bins that double."""
    bins = max((row["cluster_bins"] for row in layers), key=len)
    first = min(row["cluster_bins"][0][0] for row in layers)
    edges = [(low, high) for low, high, _ in bins if low >= first]
    if first == 0 and edges[0][0] != 0:
        edges.insert(0, (0, 0))
    top = max(count for row in layers for *_, count in row["cluster_bins"])

    def panel(axes: Any, row: Values, bottom: bool, left: bool) -> None:
        counts = {low: count for low, _, count in row["cluster_bins"]}
        heights = [counts.get(low, 0) for low, _ in edges]
        axes.bar(range(len(edges)), heights, width=0.8, color=_COLORS[0])
        for x, height in enumerate(heights):
            if height:
                axes.annotate(f"{height}", (x, height), xytext=(0, 2), textcoords="offset points", ha="center",
                              fontsize=7)  # fmt: skip
        axes.set_ylim(0, top * 1.18)
        axes.set_xticks(range(len(edges)))
        labels = [str(low) if number % 2 == 0 or len(edges) <= 7 else "" for number, (low, _) in enumerate(edges)]
        axes.set_xticklabels(labels if bottom else [], fontsize=7.5)
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        if not left:
            axes.set_yticklabels([])
        axes.set_title(f"layer {row['layer']}", pad=3)

    return _grid(
        layers, 2, panel, 1.25, "neurons in a cluster, at least", "clusters", f"clusters-{name}",
        f"Histograms of the cluster sizes of {name}, one per layer",
    )  # fmt: skip


def spectra(layers: Sequence[Values], kernel: str, name: str) -> str:
    """Leading eigenvalues of one kernel, a panel per layer: of the original, and after the fusion."""
    values = [v for row in layers for name in ("before", "after") for v in row["ntk_spectrum"][kernel][name]]

    def panel(axes: Any, row: Values, bottom: bool, left: bool) -> None:
        spectrum = row["ntk_spectrum"][kernel]
        for number, part in enumerate(("before", "after")):
            style = {**_series(number), "marker": None, "linestyle": ("-", "--")[number]}
            ranks = range(1, len(spectrum[part]) + 1)
            axes.plot(ranks, [_positive(value) for value in spectrum[part]], **style)
        _log_scale(axes.yaxis, [_positive(value) for value in values])
        axes.set_xlim(0, max(len(row["ntk_spectrum"][kernel]["before"]) for row in layers) + 1)
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        if not bottom:
            axes.set_xticklabels([])
        if not left:
            axes.set_yticklabels([])
        axes.grid(axis="y")
        axes.set_title(f"layer {row['layer']}", pad=3)

    return _grid(
        layers, 3, panel, 1.25, "rank", "share of the original's trace", f"spectra-{kernel}-{name}",
        f"Line plots of the {kernel} kernel's leading eigenvalues of {name} before and after, one per layer",
    )  # fmt: skip


def curves(series: Sequence[tuple[int, Values]], x_label: str, y_label: str, name: str) -> str:
    """Curves of means with bands from the smallest to the largest value; each with its number in the page's keys."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, curve in series:
            style = _series(number)
            if len(curve["x"]) > 24:
                style["marker"] = None
            x, mean, low, high = ([_finite(value) for value in curve[key]] for key in ("x", "mean", "low", "high"))
            axes.plot(x, mean, **style)
            if curve["low"] != curve["high"]:
                axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid()

    return _draw(draw, (_WIDTH, 2.9), name, f"Line plot of {y_label} over {x_label}, a line per run")


def _grid(
    layers: Sequence[Values],
    columns: int,
    panel: Callable[[Any, Values, bool, bool], None],
    height: float,
    x_label: str,
    y_label: str,
    name: str,
    label: str,
) -> str:
    """Small panels of equal scales, one per layer, row by row."""
    columns = min(columns, len(layers))
    rows = -(-len(layers) // columns)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(rows, columns, squeeze=False)
        for number, axes in enumerate(grid.flat):
            if number < len(layers):
                panel(axes, layers[number], number + columns >= len(layers), number % columns == 0)
            else:
                axes.remove()
        figure.supxlabel(x_label, fontsize=9)
        figure.supylabel(y_label, fontsize=9)

    return _draw(draw, (_WIDTH, 0.55 + height * rows), name, label)


def _positive(value: float) -> float:
    """What a logarithmic axis can show; anything else leaves a gap."""
    return value if math.isfinite(value) and value > 0 else math.nan


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _shorten(text: str, length: int) -> str:
    """`text` with its middle left out where it is longer than `length`."""
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[-tail:]}"


def _log_scale(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis whose ticks are plain numbers, one to three a decade, enough of them on any range."""
    shown = [value for value in values if math.isfinite(value)] or [0.1, 1.0]
    low, high = min(shown) / 1.15, max(shown) * 1.15
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(ticks) >= 3:
            break
    if len(ticks) > 7:
        ticks = ticks[:: -(-len(ticks) // 7)]
    axis._set_axes_scale("log")
    getattr(axis.axes, f"set_{axis.axis_name}lim")(low, high)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.set_minor_locator(FixedLocator([]))
    axis.set_minor_formatter(NullFormatter())


def _draw(draw: Callable[[Figure], None], inches: tuple[float, float], name: str, label: str) -> str:
    """Call `draw` on a new figure and return it as an SVG element for a page."""
    # The reader's own matplotlibrc must not show.
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        # Of measures only: the page's own fonts draw the text.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=inches, layout="constrained")
        draw(figure)
        buffer = io.BytesIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(buffer, metadata=metadata)
    return _element(buffer.getvalue(), name, label, inches)


def _element(document: bytes, name: str, label: str, inches: tuple[float, float]) -> str:
    """An SVG document as an element of an HTML page: no namespaces, identifiers of its own, a text for readers."""
    root = ElementTree.fromstring(document)
    prefix = re.sub(r"[^A-Za-z0-9]+", "-", name)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{_SVG}metadata":
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        if "id" in element.attrib:
            element.attrib["id"] = f"{prefix}-{element.attrib['id']}"
        if _HREF in element.attrib:
            element.attrib["href"] = f"#{prefix}-{element.attrib.pop(_HREF).removeprefix('#')}"
        for key, value in element.attrib.items():
            element.attrib[key] = re.sub(r"url\(#", f"url(#{prefix}-", value).replace(_INK, "currentColor")
    width, height = (round(96 * inch) for inch in inches)
    root.attrib.pop("version", None)
    root.attrib.update(
        {"class": "plot", "role": "img", "aria-label": label, "width": str(width), "height": str(height)}
    )
    return ElementTree.tostring(root, encoding="unicode")
