"""Line charts as SVG text, without a library: a few panels, logarithmic abscissa, one legend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 330, 250  # of one panel's plot area, in px
LEFT, TOP, GAP_X, GAP_Y = 52, 64, 62, 74
COLUMNS = 2
LEGEND_ROW = 18
INK, GRID = "#33373d", "#e3e6ea"
COLOURS = (
    "#d1495b",
    "#6c757d",
    "#9aa1a9",
    "#2e86ab",
    "#7fb7d4",
    "#edae49",
    "#c98a1b",
    "#8f6a12",
    "#66a182",
    "#2f6f4f",
    "#8d6cab",
    "#5b3f8c",
    "#b58db6",
)
DASHES = ("", "5 3", "2 2")


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot.

    Attributes:
        title: above it.
        lines: name -> (abscissas above 0, ordinates between 0 and 1).
    """

    title: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]


def line_chart(panels: Sequence[Panel], heading: str, abscissa: str, ordinate: str) -> str:
    """The text of an SVG file. The first line of every panel stands out; a name has one colour in all panels.

    Raises:
        ValueError: there is no panel, or an abscissa is not above 0.
    """
    if not panels or any(x <= 0 for panel in panels for xs, _ in panel.lines.values() for x in xs):
        raise ValueError("a chart needs at least one panel, and abscissas above 0")
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    rows = math.ceil(len(panels) / COLUMNS)
    columns = min(COLUMNS, len(panels))
    legend_rows = math.ceil(len(names) / 3)
    width = LEFT + columns * (WIDTH + GAP_X)
    legend_top = TOP + rows * (HEIGHT + GAP_Y)
    height = legend_top + legend_rows * LEGEND_ROW + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{INK}">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="24" font-size="15" font-weight="600">{escape(heading)}</text>',
    ]
    for place, panel in enumerate(panels):
        x = LEFT + (place % COLUMNS) * (WIDTH + GAP_X)
        y = TOP + (place // COLUMNS) * (HEIGHT + GAP_Y)
        parts += _panel(panel, names, x, y, abscissa, ordinate)
    step = (width - LEFT) / 3
    for place, name in enumerate(names):
        x, y = LEFT + (place % 3) * step, legend_top + (place // 3) * LEGEND_ROW
        parts.append(f'<line x1="{x:.0f}" y1="{y - 4}" x2="{x + 22:.0f}" y2="{y - 4}" {_stroke(names, name)}/>')
        parts.append(f'<text x="{x + 28:.0f}" y="{y}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _stroke(names: Sequence[str], name: str) -> str:
    place = names.index(name)
    dash = DASHES[place // len(COLOURS) % len(DASHES)]
    width = 3 if place == 0 else 1.6
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'stroke="{COLOURS[place % len(COLOURS)]}" stroke-width="{width}" fill="none" stroke-linejoin="round"{dashed}'
    )


def _panel(panel: Panel, names: Sequence[str], x: int, y: int, abscissa: str, ordinate: str) -> list[str]:
    every = [v for xs, _ in panel.lines.values() for v in xs] or [1.0, 10.0]
    low, high = math.log10(min(every)), math.log10(max(every))
    span = max(high - low, 1e-9)

    def across(value: float) -> float:
        return x + WIDTH * (math.log10(value) - low) / span

    def up(value: float) -> float:
        return y + HEIGHT * (1 - min(max(value, 0.0), 1.0))

    parts = [f'<text x="{x}" y="{y - 10}" font-weight="600">{escape(panel.title)}</text>']
    for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        parts.append(
            f'<line x1="{x}" y1="{up(tick):.1f}" x2="{x + WIDTH}" y2="{up(tick):.1f}" stroke="{GRID}"/>'
            f'<text x="{x - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:.1f}</text>'
        )
    for tick in [m * 10**p for p in range(5) for m in (1, 2, 5)]:
        if low <= math.log10(tick) <= high + 1e-9:
            parts.append(
                f'<line x1="{across(tick):.1f}" y1="{y}" x2="{across(tick):.1f}" y2="{y + HEIGHT}" stroke="{GRID}"/>'
                f'<text x="{across(tick):.1f}" y="{y + HEIGHT + 16}" text-anchor="middle">{tick}</text>'
            )
    parts.append(f'<text x="{x + WIDTH / 2}" y="{y + HEIGHT + 34}" text-anchor="middle">{escape(abscissa)}</text>')
    middle = y + HEIGHT / 2
    parts.append(
        f'<text x="{x - 38}" y="{middle}" text-anchor="middle" transform="rotate(-90 {x - 38} {middle})">'
        f"{escape(ordinate)}</text>"
    )
    for name in reversed(list(panel.lines)):  # the first on top
        xs, ys = panel.lines[name]
        points = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in zip(xs, ys, strict=True))
        parts.append(f'<polyline points="{points}" {_stroke(names, name)}/>')
    return parts
