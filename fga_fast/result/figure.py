"""The figure of `Explanation.plot`: image, TransMM, gates and the gated result side by side."""

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
_SHARP = 336  # pixels; small pictures are enlarged to this before painting, so that heat maps stay smooth
_PANEL, _GAP, _LEFT, _TOP, _BOTTOM = 2.1, 0.07, 0.36, 0.36, 0.36  # inches


def draw(
    pictures: Tensor,  # [M, H, W, 3] float32 in [0,1]
    relevance: Tensor,  # [M, P]
    ungated: Tensor | None,  # [M, P]
    gates: Mapping[int, Tensor],  # block -> [M, P]
    grid: tuple[int, int],
    labels: Sequence[str],  # M
    colormap: str,
) -> Figure:
    """M rows, one for each image and target; columns image, TransMM if computed, one gate per gated block, the result.

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
    limit, signed = _gate_limit(logs), bool((relevance < 0).any())
    columns = _columns(_enlarge(pictures), relevance, ungated, logs, grid, colormap, signed)
    panel_height = _PANEL * pictures.shape[1] / pictures.shape[2]
    width = _LEFT + len(columns) * (_PANEL + _GAP)
    height = _TOP + rows * (panel_height + _GAP) + _BOTTOM
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")

    def place(column: float, below: float, wide: float, high: float) -> Any:
        """Axes by their place in inches: `column` from the left, top edge `below` the panels' top edge."""
        left, bottom = _LEFT + column * (_PANEL + _GAP), height - _TOP - below - high
        return figure.add_axes((left / width, bottom / height, wide / width, high / height))

    for row in range(rows):
        for number, (title, values) in enumerate(columns):
            axes = place(number, row * (panel_height + _GAP), _PANEL, panel_height)
            _panel(axes, values[row], limit)
            if row == 0:
                axes.set_title(title, fontsize=11, pad=6)
            if number == 0:
                axes.set_ylabel(labels[row], fontsize=11, labelpad=7)
    below = rows * (panel_height + _GAP) + 0.02
    _heat_bar(place(len(columns) - 1, below, _PANEL, 0.09), colormap, signed)
    if logs:  # the gates' columns are the last but one
        first = len(columns) - 1 - len(logs)
        _gate_bar(place(first, below, len(logs) * (_PANEL + _GAP) - _GAP, 0.09), limit)
    return figure


def _enlarge(pictures: Tensor) -> Tensor:  # [B, H, W, 3] -> [B, H', W', 3]
    height, width = pictures.shape[1:3]
    factor = -(-_SHARP // min(height, width))
    if factor <= 1:
        return pictures
    larger = functional.interpolate(pictures.permute(0, 3, 1, 2), scale_factor=factor, mode="bicubic")
    return larger.permute(0, 2, 3, 1).clamp(0, 1)


def _columns(
    pictures: Tensor,  # [M, H, W, 3]
    relevance: Tensor,  # [M, P]
    ungated: Tensor | None,  # [M, P]
    logs: Mapping[int, Tensor],  # block -> [M, gh, gw], logarithms of gates
    grid: tuple[int, int],
    colormap: str,
    signed: bool,
) -> list[tuple[str, Tensor]]:
    """Titles with one value per row: [M, H, W, 3] pictures or [M, gh, gw] logarithms of gates."""
    # The picture under a heat map is grey: nobody could tell its own colours from those of the map.
    luminance = pictures @ pictures.new_tensor([0.299, 0.587, 0.114])  # [M, H, W]
    grey = luminance.unsqueeze(-1).expand_as(pictures)
    columns = [("image", pictures)]
    if ungated is not None and logs:
        columns.append(("ungated" if signed else "TransMM", paint(ungated, grid, grey, colormap, 0.55, signed)))
    columns += [(f"gate, block {block}", values) for block, values in logs.items()]
    # The names FGA and TransMM stand for relevance without a sign.
    method = "relevance" if signed else "FGA" if logs else "TransMM"
    return [*columns, (method, paint(relevance, grid, grey, colormap, 0.55, signed))]


def _gate_limit(logs: Mapping[int, Tensor]) -> float:  # block -> [M, gh, gw]
    """The largest |log gate| shown, so that the colour scale is centred at 1 and shared by all gate panels."""
    largest = [float(values.abs().max()) for values in logs.values()]
    if not all(map(math.isfinite, largest)):
        raise ValueError("gates: contain values that are not finite and above 0, which cannot be drawn")
    return max([*largest, 0.05])


def _panel(axes: Any, values: Tensor, limit: float) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if values.dim() == 3:
        axes.imshow(values.numpy(), interpolation="antialiased")
    else:
        axes.imshow(values.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest", aspect="auto")


def _heat_bar(axes: Any, colormap: str, signed: bool) -> None:
    ramp = torch.linspace(0, 1, 256, dtype=torch.float32, device="cpu")
    colours = apply_colormap(ramp, colormap)  # [256, 3]
    axes.imshow(colours.unsqueeze(0).numpy(), aspect="auto", extent=(0, 1, 0, 1))
    if signed:
        _ends(axes, [0, 0.5, 1], ["against", "0", "for"])
    else:
        _ends(axes, [0, 1], ["low", "high relevance"])


def _gate_bar(axes: Any, limit: float) -> None:
    ramp = torch.linspace(-1, 1, 256, dtype=torch.float32, device="cpu")
    axes.imshow(ramp.unsqueeze(0).numpy(), cmap="RdBu_r", aspect="auto", extent=(0, 1, 0, 1))
    ends = [f"× {_short(math.exp(sign * limit))}" for sign in (-1, 1)]
    _ends(axes, [0, 0.5, 1], [ends[0], "× 1", ends[1]])


def _ends(axes: Any, ticks: list[float], labels: list[str]) -> None:
    """Ticks under a colour bar, the outer ones aligned with its ends so that they stay inside the figure."""
    axes.set_yticks([])
    axes.set_xticks(ticks, labels, fontsize=9)
    axes.tick_params(length=0, pad=3)
    for spine in axes.spines.values():
        spine.set_visible(False)
    written = axes.get_xticklabels()
    written[0].set_horizontalalignment("left")
    written[-1].set_horizontalalignment("right")


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"
