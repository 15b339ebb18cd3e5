"""Draw the perplexity of a narrowed language model over its width, from `bench/results/llm-cpu.json`.

    python docs/scripts/draw_language_model.py

writes `docs/images/language-model-light.svg` and `language-model-dark.svg`, the same bytes for the same results and
matplotlib.
"""

from __future__ import annotations

import statistics

import matplotlib
from drawing import INK, drawn, write
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter
from results_tables import results

SHARES = (0.5, 0.625, 0.75)
#: Kind of text -> what it is called.
TEXTS = {"shakespeare": "plays", "sst2": "opinions", "webnlg": "facts"}
#: Method, sequential and refitted -> colours on light and on dark pages, and the style of the line.
LINES: dict[str, tuple[dict[str, str], str]] = {
    "auto by layer": ({"light": "#00796b", "dark": "#4db6ac"}, "-"),
    "auto": ({"light": "#24292f", "dark": "#e6edf3"}, "-"),
    "2ssp": ({"light": "#c2571a", "dark": "#f0955a"}, "-"),
    "prune": ({"light": "#c2571a", "dark": "#f0955a"}, "--"),
    "obs": ({"light": "#6a4fb3", "dark": "#b39ddb"}, "-"),
    "osscar": ({"light": "#6a4fb3", "dark": "#b39ddb"}, "--"),
}


def draw(theme: str) -> str:
    """The plot for `light` or `dark` pages, as SVG."""
    return drawn(theme, (9.2, 4.1), _fill)


def _fill(figure: Figure, theme: str) -> None:
    for axes, kind in zip(figure.subplots(1, len(TEXTS)), TEXTS, strict=True):
        _draw_text(axes, theme, kind)
    figure.axes[0].set_ylabel("perplexity")
    figure.axes[1].set_xlabel("share of the FFNs' parameters")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=len(LINES), fontsize=11)


def _draw_text(axes: matplotlib.axes.Axes, theme: str, kind: str) -> None:
    """Medians over seeds, and the range of the seeds, which were not drawn for every width."""
    rows = results("llm-cpu")["rows"]
    (whole,) = (row["perplexity"][kind] for row in rows if row["form"] == "full")
    axes.axhline(whole, color=INK[theme][0], linewidth=1, linestyle=(0, (4, 3)))
    for name, (colours, style) in LINES.items():
        forms = {share: f"{share:g} {name} refit sequential" for share in SHARES}
        found = [[row["perplexity"][kind] for row in rows if row["form"] == form] for form in forms.values()]
        middle = [statistics.median(values) for values in found]
        ends = [
            [m - min(values) for m, values in zip(middle, found, strict=True)],
            [max(values) - m for m, values in zip(middle, found, strict=True)],
        ]
        axes.errorbar(
            SHARES, middle, ends, color=colours[theme], linestyle=style, linewidth=1.6, elinewidth=1, marker="o",
            markersize=3.5, label=name,
        )  # fmt: skip
    axes.set_title(TEXTS[kind], fontsize=12.5)
    axes.set_xticks(SHARES, ["½", "⅝", "¾"])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.yaxis.set_minor_locator(FixedLocator([]))
    axes.grid(axis="y", color=INK[theme][1], linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Write both."""
    write("language-model", draw)


if __name__ == "__main__":
    main()
