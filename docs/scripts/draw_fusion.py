"""Draw the idea for light and dark pages: a wide FFN, its neurons in clusters, a narrow FFN whose neurons have sizes.

    python docs/scripts/draw_fusion.py

writes `docs/images/fusion-light.svg` and `fusion-dark.svg`.
"""

from __future__ import annotations

from pathlib import Path

IMAGES = Path(__file__).parents[1] / "images"

#: The cluster of each neuron of the wide FFN, from top to bottom.
CLUSTERS = (0, 1, 0, 2, 1, 0, 3, 2, 0, 1, 2, 0)
#: Colours of the clusters, of text, of quiet text, and of the dots for inputs and outputs.
THEMES = {
    "light": (("#00796b", "#c2571a", "#5c6bc0", "#b58900"), "#24292f", "#57606a", "#8c959f"),
    "dark": (("#4db6ac", "#f0955a", "#9fa8da", "#e3c25f"), "#e6edf3", "#9da7b1", "#6e7681"),
}
WIDTH, HEIGHT, TOP, BOTTOM = 760, 300, 58, 262
#: Columns: inputs, neurons and outputs of the wide FFN; of the narrow one.
WIDE, NARROW = (50, 150, 250), (510, 610, 710)


def spread(count: int, margin: float = 0.0) -> list[float]:
    """Heights of `count` dots between top and bottom."""
    top, bottom = TOP + margin, BOTTOM - margin
    return [top + (bottom - top) * (n + 0.5) / count for n in range(count)]


def draw(theme: str) -> str:
    """The picture for `light` or `dark` pages, as SVG."""
    colours, ink, quiet, dot = THEMES[theme]
    sizes = [CLUSTERS.count(cluster) for cluster in range(len(colours))]
    parts: list[str] = []

    def lines(columns: tuple[int, int, int], neurons: list[float], clusters: list[int], widths: list[float]) -> None:
        for side in (columns[0], columns[2]):
            for end in spread(4, 26):
                for y, cluster, width in zip(neurons, clusters, widths, strict=True):
                    parts.append(
                        f'<path d="M{side} {end:.1f}L{columns[1]} {y:.1f}" stroke="{colours[cluster]}" '
                        f'stroke-width="{width:.2f}" opacity="0.38"/>'
                    )

    def dots(column: int) -> None:
        parts.extend(f'<circle cx="{column}" cy="{y:.1f}" r="5" fill="{dot}"/>' for y in spread(4, 26))

    def text(x: float, y: float, words: str, *, size: int = 17, colour: str = ink, weight: str = "normal") -> None:
        parts.append(
            f'<text x="{x}" y="{y:.1f}" font-size="{size}" fill="{colour}" font-weight="{weight}" '
            f'text-anchor="middle">{words}</text>'
        )

    wide = spread(len(CLUSTERS))
    lines(WIDE, wide, list(CLUSTERS), [0.9] * len(wide))
    narrow = spread(len(colours), 8)
    lines(NARROW, narrow, list(range(len(colours))), [0.9 * size**0.5 for size in sizes])
    for column in (WIDE[0], WIDE[2], NARROW[0], NARROW[2]):
        dots(column)
    for y, cluster in zip(wide, CLUSTERS, strict=True):
        parts.append(f'<circle cx="{WIDE[1]}" cy="{y:.1f}" r="7" fill="{colours[cluster]}"/>')
    for y, size, colour in zip(narrow, sizes, colours, strict=True):
        # The area of the dot is the size of the cluster.
        radius = 7 * size**0.5
        parts.append(f'<circle cx="{NARROW[1]}" cy="{y:.1f}" r="{radius:.1f}" fill="{colour}"/>')
        text(NARROW[1] + radius + 20, y + 6, f"×{size}", size=17, weight="bold")
    text(WIDE[1], 28, "wide FFN", size=20, weight="bold")
    text(NARROW[1], 28, "narrow FFN", size=20, weight="bold")
    text(WIDE[1], 288, f"{len(CLUSTERS)} neurons, {len(colours)} clusters", colour=quiet)
    text(NARROW[1], 288, "one neuron a cluster, times its size", colour=quiet)
    parts.append(f'<path d="M320 160H430" stroke="{ink}" stroke-width="2"/>')
    parts.append(f'<path d="M440 160L426 153V167Z" fill="{ink}"/>')
    text(378, 142, "cluster and fuse", colour=ink)
    text(378, 190, "and correct on a little text", size=15, colour=quiet)
    title = (
        "An FFN of twelve neurons becomes one of four: neurons with similar weights are replaced by one neuron, which "
        "is scaled by their number."
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" font-family="Helvetica, Arial, sans-serif" fill="none">\n<title>{title}</title>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def main() -> None:
    """Write both."""
    for theme in THEMES:
        (IMAGES / f"fusion-{theme}.svg").write_text(draw(theme), encoding="utf-8")


if __name__ == "__main__":
    main()
