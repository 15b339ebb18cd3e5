"""What the plots of the documentation have in common: colours, fonts, and that equal results give equal bytes."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

IMAGES = Path(__file__).parents[1] / "images"
#: Ink and grid on light and on dark pages.
INK = {"light": ("#24292f", "#d0d7de"), "dark": ("#e6edf3", "#3d444d")}


def drawn(theme: str, size: tuple[float, float], fill: Callable[[Figure, str], None]) -> str:
    """A plot for `light` or `dark` pages, as SVG.

    Args:
        theme: one of the two.
        size: in inches.
        fill: draws into a figure, in the colours of a theme.
    """
    ink, grid = INK[theme]
    settings = {
        "svg.hashsalt": "mlp-fusion", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 12.5,
        "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
        "text.color": ink, "axes.edgecolor": grid, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        fill(figure, theme)
        target = io.StringIO()
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    # matplotlib leaves blanks at the ends of lines.
    return "".join(f"{line.rstrip()}\n" for line in target.getvalue().splitlines())


def write(name: str, draw: Callable[[str], str]) -> None:
    """Write the plot of each theme to `docs/images/<name>-<theme>.svg`."""
    for theme in INK:
        (IMAGES / f"{name}-{theme}.svg").write_text(draw(theme), encoding="utf-8")
