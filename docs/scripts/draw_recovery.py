"""Draw how losses fall in training after narrowing, from `bench/results/recovery-cpu.json`, for light and dark pages.

    python docs/scripts/draw_recovery.py

writes `docs/images/recovery-light.svg` and `recovery-dark.svg`, the same bytes for the same results and matplotlib.
"""

from __future__ import annotations

import statistics

import matplotlib
from drawing import INK, drawn, write
from matplotlib.figure import Figure
from recovery_tables import GROUPS, OPTIMIZERS, STEPS, students
from results_tables import results

#: Student -> colours on light and on dark pages, and the style of the line.
LINES: dict[str, tuple[dict[str, str], str]] = {
    "auto": ({"light": "#24292f", "dark": "#e6edf3"}, "-"),
    "auto, matched": ({"light": "#24292f", "dark": "#e6edf3"}, ":"),
    "fusion, folded": ({"light": "#00796b", "dark": "#4db6ac"}, "-"),
    "fusion, matched": ({"light": "#00796b", "dark": "#4db6ac"}, ":"),
    "prune": ({"light": "#c2571a", "dark": "#f0955a"}, "-"),
}


def draw(theme: str) -> str:
    """The plot for `light` or `dark` pages, as SVG."""
    return drawn(theme, (9.2, 4.2), _fill)


def _fill(figure: Figure, theme: str) -> None:
    for axes, optimizer in zip(figure.subplots(1, 2, sharey=True), OPTIMIZERS, strict=True):
        _draw_curves(axes, theme, optimizer)
    figure.axes[0].set_ylabel("loss on held-out text, nats")
    figure.axes[0].legend(frameon=False, loc="upper right", fontsize=11.5)


def _draw_curves(axes: matplotlib.axes.Axes, theme: str, optimizer: str) -> None:
    """Means over seeds, and the range of the seeds; step 0 stands at 5, as the axis is logarithmic."""
    whole = [line["loss"] for line in results("recovery-cpu")["originals"] if line["model"] == "small"]
    axes.axhline(statistics.mean(whole), color=INK[theme][0], linewidth=1, linestyle=(0, (4, 3)))
    for name, (colours, style) in LINES.items():
        runs = students(GROUPS["full"], optimizer)[name]
        steps = [step for step in STEPS if all(str(step) in run["losses"] for run in runs)]
        found = [[run["losses"][str(step)] for run in runs] for step in steps]
        at = [max(step, 5) for step in steps]
        axes.fill_between(at, [min(f) for f in found], [max(f) for f in found], color=colours[theme], alpha=0.12, lw=0)
        means = [statistics.mean(f) for f in found]
        axes.plot(at, means, color=colours[theme], linestyle=style, linewidth=1.6, label=name)
    axes.set_xscale("log")
    noted = [step for step in STEPS if step <= steps[-1]]
    axes.set_xticks([max(step, 5) for step in noted], [str(step) for step in noted])
    axes.minorticks_off()
    axes.set_xlabel(f"steps of {OPTIMIZERS[optimizer]}")
    axes.grid(axis="y", color=INK[theme][1], linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Write both."""
    write("recovery", draw)


if __name__ == "__main__":
    main()
