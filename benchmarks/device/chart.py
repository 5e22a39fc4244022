"""A bar chart of explanations in multiples of the forward pass. Writes SVG itself: a bare machine cannot plot."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from rows import Row

BAR, GAP, LEFT, WIDTH = 16, 6, 300, 420


def draw(rows: Sequence[Row], device: str) -> str:
    """One bar for each explanation with a ratio, and a line at 1 for the plain forward pass."""
    shown = [row for row in rows if row.benchmark == "explainer" and row.ratio_to_forward and row.name != "forward"]
    longest = max((row.ratio_to_forward or 1.0 for row in shown), default=1.0)
    height = 60 + len(shown) * (BAR + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 80}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="20" font-size="14">{escape(device)}: explanation / plain forward pass, ViT-B/16</text>',
    ]
    for number, row in enumerate(shown):
        y, ratio = 40 + number * (BAR + GAP), row.ratio_to_forward or 0.0
        colour = "#c0392b" if "reference" in row.name else "#7f8c8d" if "composite" in row.name else "#2471a3"
        length = WIDTH * ratio / longest
        label = escape(f"{row.name}, {row.dtype}, batch {row.batch}")
        parts.append(f'<text x="{LEFT - 8}" y="{y + BAR - 4}" text-anchor="end">{label}</text>')
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{colour}"/>')
        parts.append(f'<text x="{LEFT + length + 4:.1f}" y="{y + BAR - 4}">{ratio:.2f}</text>')
    one = LEFT + WIDTH / longest
    parts.append(
        f'<line x1="{one:.1f}" y1="34" x2="{one:.1f}" y2="{height - 10}" stroke="black" stroke-dasharray="3"/>'
    )
    return "\n".join([*parts, "</svg>"]) + "\n"
