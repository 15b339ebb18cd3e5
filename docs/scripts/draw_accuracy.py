"""Draw accuracy after fine-tuning against the width of the FFNs, from `bench/results`, for light and dark pages.

    python docs/scripts/draw_accuracy.py

writes `docs/images/accuracy-light.svg` and `accuracy-dark.svg`, the same bytes for the same results and matplotlib.
"""

from __future__ import annotations

import statistics

import matplotlib
from drawing import INK, drawn, write
from matplotlib.figure import Figure
from results_tables import fine_tunes

#: Name in the plot -> modes by width, and its colour on light and on dark pages.
METHODS: dict[str, tuple[dict[float, str], str, str]] = {
    "prune, 512 sentences": ({0.25: "prune", 0.5: "prune, half"}, "#c2571a", "#f0955a"),
    "fusion, 512 sentences": ({0.25: "fusion", 0.5: "fusion, half"}, "#00796b", "#4db6ac"),
    "published, without data": ({0.25: "published", 0.5: "published, half"}, "#5c6bc0", "#9fa8da"),
}
#: The same for what there is at one width only, by how far beside it stands.
SINGLE: dict[str, tuple[str, str, str, float]] = {
    "fusion of the trained model, distilled": ("fusion, late, layerwise, logits", "#004d40", "#b2dfdb", -0.045),
    "select, sequential": ("select, sequential", "#8e24aa", "#ce93d8", 0.045),
    "the default with text": ("auto", "#c62828", "#ef9a9a", 0.09),
}


def accuracies(mode: str) -> list[float]:
    """Accuracy on SST-2 in per cent, by seed."""
    return [100 * run["final"]["accuracy"] for run in fine_tunes("sst2")[mode]]


def draw(theme: str) -> str:
    """The plot for `light` or `dark` pages, as SVG."""
    return drawn(theme, (6.2, 3.9), _fill)


def _fill(figure: Figure, theme: str) -> None:
    ink, grid = INK[theme]
    place = 1 if theme == "light" else 2
    axes = figure.add_subplot()
    full = accuracies("full")
    axes.axhspan(min(full), max(full), color=ink, alpha=0.12, linewidth=0)
    axes.axhline(statistics.mean(full), color=ink, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate("full width", (0.985, max(full)), xytext=(0, 3), textcoords="offset points", ha="right")
    for name, (mode, *colours, beside) in SINGLE.items():
        _points(axes, name, [0.25 + beside / 2], [accuracies(mode)], colours[place - 1], marker="D")
    for n, (name, (modes, *colours)) in enumerate(METHODS.items()):
        beside = 0.009 * (n - 1)
        found = [accuracies(mode) for mode in modes.values()]
        _points(axes, name, [width + beside for width in modes], found, colours[place - 1])
    axes.set_xlim(0.17, 1.0)
    axes.set_xticks([0.25, 0.5, 1.0], ["a quarter", "a half", "whole"])
    axes.set_xlabel("width of every FFN")
    axes.set_ylabel("accuracy on SST-2, %")
    axes.grid(axis="y", color=grid, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right", fontsize=11.5)


def _points(
    axes: matplotlib.axes.Axes, name: str, widths: list[float], found: list[list[float]], colour: str, marker: str = "o"
) -> None:
    """Means over seeds, with bars from the smallest to the largest."""
    means = [statistics.mean(values) for values in found]
    reach = [
        [mean - min(values) for mean, values in zip(means, found, strict=True)],
        [max(values) - mean for mean, values in zip(means, found, strict=True)],
    ]
    axes.errorbar(
        widths, means, yerr=reach, color=colour, marker=marker, markersize=6, linewidth=1.6, capsize=3,
        label=name, linestyle="-" if len(widths) > 1 else "none",
    )  # fmt: skip


def main() -> None:
    """Write both."""
    write("accuracy", draw)


if __name__ == "__main__":
    main()
