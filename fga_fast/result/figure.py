"""The figure of `Explanation.plot`: image, ungated and gated result, and gates side by side.

All panels and colour bars are one picture. With axes for each, matplotlib takes longer than a small model does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from fga_fast.result.colours import apply_colormap
from fga_fast.result.heatmap import paint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_ROWS = 64
_DPI = 150
_LETTERS = 32  # of a caption, which a panel has room for
_PANEL, _GAP, _LEFT, _TOP, _BOTTOM, _BAR = 315, 10, 54, 54, 57, 14  # pixels


def draw(
    pictures: Tensor,  # [M, H, W, 3] float32 in [0,1]
    relevance: Tensor,  # [M, P]
    ungated: Tensor | None,  # [M, P]
    gates: Mapping[int, Tensor],  # block -> [M, P]
    grid: tuple[int, int],
    labels: Sequence[str],  # M
    colormap: str,
    signed: bool,
    captions: Mapping[int, Sequence[str]],  # block -> M, or none
) -> Figure:
    """M rows, one for each image and target; columns image, ungated if computed, one gate per gated block, the result.

    Captions stand in the gates of their block.

    Returns:
        A figure that pyplot does not know of, so nothing has to be closed.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no rows or more than 64.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Explanation.plot needs matplotlib, an optional extra: pip install 'fga_fast[plot]'; "
            "overlay() does not need it"
        ) from error
    rows = len(labels)
    if not 0 < rows <= _MAX_ROWS:
        raise ValueError(f"explanation: expected 1 to {_MAX_ROWS} image-target rows to draw, got {rows}; slice it")
    logs = {block: gate.detach().float().log().reshape(-1, *grid) for block, gate in sorted(gates.items())}
    limit = _gate_limit(logs)
    columns = _columns(_resized(pictures), relevance, ungated, logs, limit, grid, colormap, signed)
    page = _Page(Figure, rows, len(columns), columns[0][1].shape[1])
    for number, (title, panels) in enumerate(columns):
        page.column(number, title, panels)
    for row, label in enumerate(labels):
        page.label(row, label)
    for number, block in enumerate(logs, start=len(columns) - 1 - len(logs)):
        for row, caption in enumerate(captions.get(block, [])):
            page.caption(number, row, caption)
    ramp = torch.linspace(0, 1, _PANEL, dtype=torch.float32, device="cpu")
    words = ["against", "0", "for"] if signed else ["low", "high relevance"]
    page.bar(len(columns) - 1, apply_colormap(ramp, colormap), words)
    if logs:  # the gates' columns are the last but one
        ramp = torch.linspace(0, 1, len(logs) * (_PANEL + _GAP) - _GAP, dtype=torch.float32, device="cpu")
        ends = [f"× {_short(math.exp(sign * limit))}" for sign in (-1, 1)]
        page.bar(len(columns) - 1 - len(logs), apply_colormap(ramp, "diverging"), [ends[0], "× 1", ends[1]])
    return page.finished()


class _Page:
    """A figure with a picture of its whole size, and places in pixels from the upper left corner."""

    def __init__(self, make: Any, rows: int, columns: int, high: int) -> None:
        self._high = high
        self._size = _TOP + rows * (high + _GAP) + _BOTTOM, _LEFT + columns * (_PANEL + _GAP)
        self._figure = make(figsize=(self._size[1] / _DPI, self._size[0] / _DPI), dpi=_DPI, facecolor="white")
        self._pixels = torch.full((*self._size, 4), 255, dtype=torch.uint8, device="cpu")

    def column(self, number: int, title: str, panels: Tensor) -> None:  # [M, H', W', 3] uint8
        left = _LEFT + number * (_PANEL + _GAP)
        self._write(left + _PANEL / 2, _TOP - 12, title, 11, ha="center", va="baseline")
        for row, panel in enumerate(panels):
            above = _TOP + row * (self._high + _GAP)
            self._pixels[above : above + self._high, left : left + _PANEL, :3] = panel

    def label(self, row: int, text: str) -> None:
        middle = _TOP + row * (self._high + _GAP) + self._high / 2
        self._write(_LEFT - 14, middle, text, 11, ha="right", va="center", rotation=90)

    def caption(self, column: int, row: int, text: str) -> None:
        """Words in the lower left corner of a panel."""
        if text:
            words = text if len(text) <= _LETTERS else text[: _LETTERS - 2].rstrip() + " …"
            left, below = _LEFT + column * (_PANEL + _GAP), _TOP + row * (self._high + _GAP) + self._high
            paper = {"facecolor": "white", "alpha": 0.85, "linewidth": 0, "pad": 2}
            self._write(left + 8, below - 8, words, 9, ha="left", va="bottom", bbox=paper)

    def bar(self, column: int, colours: Tensor, words: Sequence[str]) -> None:  # [pixels, 3] in [0,1]
        """A colour bar below the panels; the outer words are aligned with its ends, so that they stay inside."""
        left, above = _LEFT + column * (_PANEL + _GAP), self._size[0] - _BOTTOM + 3
        self._pixels[above : above + _BAR, left : left + len(colours), :3] = _bytes(colours)
        for number, word in enumerate(words):
            share = number / (len(words) - 1)
            align = {0.0: "left", 1.0: "right"}.get(share, "center")
            self._write(left + share * len(colours), above + _BAR + 6, word, 9, ha=align, va="top")

    def finished(self) -> Figure:
        self._figure.figimage(self._pixels.numpy(), origin="upper")
        return self._figure  # type: ignore[no-any-return]

    def _write(self, x: float, y: float, text: str, size: int, **settings: Any) -> None:
        self._figure.text(x / self._size[1], 1 - y / self._size[0], text, fontsize=size, **settings)


def _resized(pictures: Tensor) -> Tensor:  # [M, H, W, 3] -> [M, H', W', 3] as wide as a panel
    size = max(round(_PANEL * pictures.shape[1] / pictures.shape[2]), 1), _PANEL
    fitting = functional.interpolate(pictures.permute(0, 3, 1, 2), size, mode="bicubic", antialias=True)
    return fitting.permute(0, 2, 3, 1).clamp(0, 1)


def _columns(
    pictures: Tensor,  # [M, H', W', 3]
    relevance: Tensor,  # [M, P]
    ungated: Tensor | None,  # [M, P]
    logs: Mapping[int, Tensor],  # block -> [M, gh, gw], logarithms of gates
    limit: float,
    grid: tuple[int, int],
    colormap: str,
    signed: bool,
) -> list[tuple[str, Tensor]]:
    """Titles with one panel per row, [M, H', W', 3] uint8."""
    # The picture under a heat map is grey: nobody could tell its own colours from those of the map.
    luminance = pictures @ pictures.new_tensor([0.299, 0.587, 0.114])  # [M, H', W']
    grey = luminance.unsqueeze(-1).expand_as(pictures)
    columns = [("image", _bytes(pictures))]
    if ungated is not None and logs:
        columns.append(("ungated" if signed else "TransMM", paint(ungated, grid, grey, colormap, 0.55, signed)))
    for block, values in logs.items():
        squares = functional.interpolate(values.unsqueeze(1), grey.shape[1:3], mode="nearest-exact").squeeze(1)
        columns.append((f"gate, block {block}", _bytes(apply_colormap((squares / limit + 1) / 2, "diverging"))))
    # The names FGA and TransMM stand for relevance without a sign.
    method = "relevance" if signed else "FGA" if logs else "TransMM"
    return [*columns, (method, paint(relevance, grid, grey, colormap, 0.55, signed))]


def _gate_limit(logs: Mapping[int, Tensor]) -> float:  # block -> [M, gh, gw]
    """The largest |log gate| shown, so that the colour scale is centred at 1 and shared by all gate panels."""
    largest = [float(values.abs().max()) for values in logs.values()]
    if not all(map(math.isfinite, largest)):
        raise ValueError("gates: contain values that are not finite and above 0, which cannot be drawn")
    return max([*largest, 0.05])


def _bytes(colours: Tensor) -> Tensor:  # in [0,1] -> uint8
    return (colours * 255).round().to(torch.uint8)


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"
