"""Draw what large checkpoints cost from disk to disk, from `bench/results/moe-cpu.json`, for light and dark pages.

    python docs/scripts/draw_large.py

writes `docs/images/large-light.svg` and `large-dark.svg`, the same bytes for the same results and matplotlib.
"""

from __future__ import annotations

from typing import Any

import matplotlib
from drawing import INK, drawn, write
from matplotlib.figure import Figure
from results_tables import results

#: Colours of the run and of the disk alone, on light and on dark pages.
_RUN, _DISK = {"light": "#00796b", "dark": "#4db6ac"}, {"light": "#c2571a", "dark": "#f0955a"}


def series(model_type: str, by: str) -> list[dict[str, Any]]:
    """Checkpoints of a kind that differ in `layers` or in `experts of a layer` alone, by that.

    The most layers are measured with all experts, and the numbers of experts on the same number of layers.
    """
    found = [c for c in results("moe-cpu")["checkpoints"].values() if c["model type"] == model_type]
    most = max(c["experts of a layer"] for c in found)
    few = min((c["layers"] for c in found if c["experts of a layer"] < most), default=0)
    kept = [c for c in found if (c["experts of a layer"] == most if by == "layers" else c["layers"] == few)]
    return sorted(kept, key=lambda c: c[by])


def draw(theme: str) -> str:
    """The plot for `light` or `dark` pages, as SVG."""
    return drawn(theme, (7.6, 3.3), _fill)


def _fill(figure: Figure, theme: str) -> None:
    for axes, by in zip(figure.subplots(1, 2, sharey=True), ("layers", "experts of a layer"), strict=True):
        _draw_series(axes, theme, by)
    figure.axes[0].set_ylabel("seconds")
    figure.axes[0].legend(frameon=False, loc="upper left", fontsize=11.5)


def _draw_series(axes: matplotlib.axes.Axes, theme: str, by: str) -> None:
    found = series("qwen3_moe", by)
    at = [c[by] for c in found]
    for name, key, colours in (("fusion", "tasks", _RUN), ("read and write", "tasks without reducing", _DISK)):
        axes.plot(at, [c[key]["seconds"] for c in found], marker="o", linewidth=1.6, color=colours[theme], label=name)
    axes.set_xlim(0, 1.08 * max(at))
    axes.set_ylim(bottom=0)
    axes.set_xticks(at)
    axes.set_xlabel(f"{by}, Qwen3-30B-A3B's shape")
    axes.grid(axis="y", color=INK[theme][1], linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Write both."""
    write("large", draw)


if __name__ == "__main__":
    main()
