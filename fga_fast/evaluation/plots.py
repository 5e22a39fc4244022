"""Means with intervals as SVG to stand inside a page: text and lines take the page's colours, light or dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from fga_fast.evaluation.wording import number
from fga_fast.result.ticks import ticks

_LABELS, _PLOT, _ROW, _EDGE = 250, 330, 24, 14  # pixels


class Dot(NamedTuple):
    """One line of a plot."""

    label: str
    mean: float
    low: float
    high: float
    strong: bool  # drawn in the colour of what stands out


def dots(rows: Sequence[Dot], title: str, zero: bool = False) -> str:
    """One line for each method: a dot at its mean, and its interval.

    Args:
        title: what a reader hears who does not see the plot; the values follow it.
        zero: whether 0 belongs into the plot, with a line down from it.
    """
    known = [value for row in rows for value in (row.mean, row.low, row.high) if math.isfinite(value)]
    known += [0.0] if zero else []
    if not known:
        return f"<p>{escape(title)}: no values.</p>"
    low, high = min(known), max(known)
    room = (high - low) * 0.06 or max(abs(high), 1.0) * 0.06
    low, high = low - room, high + room

    def x(value: float) -> str:
        return f"{_LABELS + (value - low) / (high - low) * _PLOT:.1f}"

    height = len(rows) * _ROW + _ROW + _EDGE
    bottom = len(rows) * _ROW + _EDGE / 2
    heard = "; ".join(f"{row.label} {number(row.mean)}" for row in rows)
    parts = [
        f'<svg role="img" viewBox="0 0 {_LABELS + _PLOT + _EDGE} {height}" class="plot">',
        f"<title>{escape(f'{title}: {heard}')}</title>",
    ]
    for tick in ticks(low, high):
        parts.append(f'<line class="grid" x1="{x(tick)}" x2="{x(tick)}" y1="0" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x(tick)}" y="{bottom + 16}">{number(tick)}</text>')
    if zero:
        parts.append(f'<line class="zero" x1="{x(0)}" x2="{x(0)}" y1="0" y2="{bottom}"/>')
    for place, row in enumerate(rows):
        y, kind = place * _ROW + _ROW / 2 + _EDGE / 4, ' class="strong"' if row.strong else ""
        parts.append(f'<g{kind}><text class="label" x="{_LABELS - 10}" y="{y + 4}">{escape(row.label)}</text>')
        if math.isfinite(row.low) and math.isfinite(row.high):
            parts.append(f'<line x1="{x(row.low)}" x2="{x(row.high)}" y1="{y}" y2="{y}"/>')
        if math.isfinite(row.mean):
            parts.append(f'<circle cx="{x(row.mean)}" cy="{y}" r="4"/>')
        parts.append("</g>")
    return "".join([*parts, "</svg>"])
