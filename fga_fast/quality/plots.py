"""Histograms, a map of positions and a plot of SAEs, as SVG to stand inside a page.

Colours are the page's, light or dark. Each plot says in words what it shows, and its numbers follow in a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from fga_fast.quality.histogram import Histogram
from fga_fast.quality.words import number, share
from fga_fast.result.page import wide
from fga_fast.result.ticks import ticks

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 440, 224, 50, 24, 10, 44  # pixels
STYLE = """
.plot { width: 100%; height: auto; max-width: 34rem } .plot text { fill: var(--dim); font-size: 12px }
.plot .x { text-anchor: middle } .plot .y { text-anchor: end } .plot .axis { fill: var(--ink) }
.plot .grid { stroke: var(--line) } .plot .bar { fill: var(--strong) }
.plot .chance { fill: none; stroke: var(--warm); stroke-width: 2; stroke-dasharray: 5 3 }
.plot .cell { fill: var(--warm) } .plot .edge { fill: none; stroke: var(--line) }
.plot .dot { fill: var(--strong) } .plot .name { fill: var(--ink); font-weight: 600 }
.key { display: inline-block; width: 1.4rem; margin-right: .4rem; vertical-align: middle; height: .8rem }
.key.bar { background: var(--strong) } .key.chance { height: 0; border-top: 2px dashed var(--warm) }
"""


class Axis(NamedTuple):
    """How the values of a histogram are called and placed."""

    label: str
    items: str  # what is counted
    whole: bool = False  # values are whole numbers, so that a bin [16, 17) is 16
    reads: str = ""  # an explanation beside the label


def bars(shown: Histogram, axis: Axis, chance: Histogram | None = None) -> str:
    """A histogram, and if given another one with the same edges, drawn as a dashed line."""
    first, last = _range(shown, chance)
    edges, counts = shown.edges[first : last + 1], shown.counts[first:last]
    other = () if chance is None else chance.counts[first:last]
    total, total_other = sum(counts), max(sum(other), 1)
    if not total:
        return f"<p>{escape(axis.label)}: none.</p>"
    heights = [count / total for count in counts]
    others = [count / total_other for count in other]
    top = max(*heights, *others, 0.0) * 1.05
    x, y = _scale(edges[0], edges[-1], _LEFT, _WIDTH - _RIGHT), _scale(0, top, _HEIGHT - _BOTTOM, _TOP)
    fullest = max(range(len(counts)), key=counts.__getitem__)
    heard = f"{axis.label} of {total:,} {axis.items}, most at {_bin(edges, fullest, axis)}: {share(heights[fullest])}"
    parts = [*_frame(heard, [(y(tick), share_tick(tick)) for tick in ticks(0, top)], axis)]
    half = (edges[1] - edges[0]) / 2 if axis.whole else 0  # the middle of a bar
    for tick in _x_ticks(edges, axis):
        parts.append(f'<text class="x" x="{x(tick + half):.1f}" y="{_HEIGHT - 24}">{number(tick)}</text>')
    for place, height in enumerate(heights):
        if counts[place]:
            left, right = x(edges[place]), x(edges[place + 1])
            said = f"{_bin(edges, place, axis)}: {counts[place]:,} ({share(height)})"
            parts.append(
                f'<rect class="bar" x="{left + 0.5:.1f}" y="{y(height):.1f}" width="{max(right - left - 1, 1):.1f}" '
                f'height="{y(0) - y(height):.1f}"><title>{escape(said)}</title></rect>'
            )
    if others:
        steps = " ".join(
            f"L{x(edges[place]):.1f} {y(h):.1f} L{x(edges[place + 1]):.1f} {y(h):.1f}" for place, h in enumerate(others)
        )
        parts.append(f'<path class="chance" d="M{x(edges[0]):.1f} {y(0):.1f} {steps} L{x(edges[-1]):.1f} {y(0):.1f}"/>')
    return "".join([*parts, "</svg>", _numbers(edges, counts, other, axis)])


def share_tick(value: float) -> str:
    """A share on an axis, as short as it can be."""
    return f"{number(value * 100)} %"


def positions(grid: Sequence[Sequence[float | None]]) -> str:
    """A map of shares [rows][columns]: the darker, the larger."""
    known = [value for row in grid for value in row if value is not None]
    if not known:
        return "<p>No position varies.</p>"
    low, high = min(known), max(known)
    columns, rows = len(grid[0]), len(grid)
    side = min(320 / columns, 260 / rows)
    heard = f"Share of the variance that is not explained, by position in the image, from {share(low)} to {share(high)}"
    parts = [
        f'<svg role="img" class="plot" viewBox="0 0 {columns * side + 2:.1f} {rows * side + 2:.1f}" '
        f'style="max-width: {columns * side + 2:.0f}px"><title>{escape(heard)}</title>'
    ]
    for r, row in enumerate(grid):
        for c, value in enumerate(row):
            if value is not None:
                said = f"row {r + 1}, column {c + 1}: {share(value)}"
                depth = 0.08 + 0.92 * (value - low) / (high - low) if high > low else 0.5
                parts.append(
                    f'<rect class="cell" x="{1 + c * side:.1f}" y="{1 + r * side:.1f}" width="{side:.1f}" '
                    f'height="{side:.1f}" fill-opacity="{depth:.2f}"><title>{said}</title></rect>'
                )
    parts.append(f'<rect class="edge" x="1" y="1" width="{columns * side:.1f}" height="{rows * side:.1f}"/></svg>')
    cells = [[f"row {r + 1}", *map(share, row)] for r, row in enumerate(grid)]
    return "".join(parts) + _details(["", *(f"column {c + 1}" for c in range(columns))], cells, "Error by position")


def scatter(points: Sequence[tuple[str, float, float]], title: str) -> str:
    """SAEs by name, L0 (on a logarithmic axis) and explained variance."""
    shown = [(name, math.log10(max(l0, 1e-3)), ev) for name, l0, ev in points]
    left, right = _roomy([place for _, place, _ in shown])
    low, high = _roomy([ev for _, _, ev in shown])
    x, y = _scale(left, right, _LEFT, _WIDTH - _RIGHT), _scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    heard = "; ".join(f"{name}: L0 {number(l0)}, explained variance {share(ev)}" for name, l0, ev in points)
    axis = Axis("L0, active features of a patch (logarithmic)", "")
    parts = _frame(f"{title}: {heard}", [(y(tick), share_tick(tick)) for tick in ticks(low, high)], axis)
    marks = [d * 10.0**power for power in range(math.floor(left), math.ceil(right) + 1) for d in (1, 2, 5)]
    marks = [mark for mark in marks if left <= math.log10(mark) <= right] or [10.0 ** shown[0][1]]
    for mark in marks:
        parts.append(f'<text class="x" x="{x(math.log10(mark)):.1f}" y="{_HEIGHT - 24}">{number(mark)}</text>')
    for name, place, ev in shown:
        parts.append(f'<circle class="dot" cx="{x(place):.1f}" cy="{y(ev):.1f}" r="5"/>')
        parts.append(f'<text class="name" x="{x(place) + 9:.1f}" y="{y(ev) + 4:.1f}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def _frame(heard: str, lines: Sequence[tuple[float, str]], axis: Axis) -> list[str]:
    """The start of a plot: its words, horizontal lines with their labels, and the name of the axis."""
    parts = [f'<svg role="img" class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}"><title>{escape(heard)}</title>']
    for place, label in lines:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 6}" y="{place + 4:.1f}">{label}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    return [*parts, f'<text class="x axis" x="{middle}" y="{_HEIGHT - 5}">{escape(axis.label + axis.reads)}</text>']


def _range(shown: Histogram, chance: Histogram | None) -> tuple[int, int]:
    """The bins from the first to the last that is not empty, as [first, last)."""
    both = [a + b for a, b in zip(shown.counts, (chance or shown).counts, strict=True)]
    full = [place for place, count in enumerate(both) if count] or [0]
    return full[0], full[-1] + 1


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Values from low to high as pixels from start to end."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _roomy(values: Sequence[float]) -> tuple[float, float]:
    """Their range with room beside it."""
    room = (max(values) - min(values)) * 0.15 or 0.05
    return min(values) - room, max(values) + room


def _x_ticks(edges: Sequence[float], axis: Axis) -> list[float]:
    """Round numbers, or at most seven of the bins' first whole numbers."""
    return list(edges[: -1 : math.ceil((len(edges) - 1) / 7)]) if axis.whole else ticks(edges[0], edges[-1])


def _bin(edges: Sequence[float], place: int, axis: Axis) -> str:
    """A bin in words."""
    low, high = edges[place], edges[place + 1]
    if not axis.whole:
        return f"{number(low)} to {number(high)}"
    return number(low) if high - low == 1 else f"{number(low)} to {number(high - 1)}"


def _numbers(edges: Sequence[float], counts: Sequence[int], other: Sequence[int], axis: Axis) -> str:
    # Shares too, since the two histograms need not count equally many.
    total, total_other = max(sum(counts), 1), max(sum(other), 1)
    rows = [
        [
            _bin(edges, place, axis),
            f"{count:,} ({share(count / total)})",
            *(share(one / total_other) for one in other[place : place + 1]),
        ]
        for place, count in enumerate(counts)
    ]
    return _details([axis.label, axis.items, *(["by chance"] if other else [])], rows, axis.label + axis.reads)


def _details(head: Sequence[str], rows: Sequence[Sequence[str]], label: str) -> str:
    """A table that opens by a click or a key."""
    return f"<details><summary>Numbers</summary>{table(head, rows, label)}</details>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], label: str, linked: bool = False) -> str:
    """A table whose first column names its rows.

    Args:
        label: what it shows, in plain text.
        linked: rows are those of the SAEs, numbered.
    """
    heads = "".join(
        f'<th scope="col"{" class=number" * bool(place)}>{escape(name)}</th>' for place, name in enumerate(head)
    )
    body = []
    for place, (first, *rest) in enumerate(rows, start=1):
        name = f'{place}. <a href="#sae-{place}">{escape(first)}</a>' if linked else escape(first)
        cells = "".join(f'<td class="number">{escape(cell)}</td>' for cell in rest)
        body.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    return wide(f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table>", label)
