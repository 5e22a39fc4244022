"""Relevance as pictures: heat maps, and heat maps over images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fga_fast.precision import relevance_dtype
from fga_fast.result.colours import apply_colormap


def paint(
    relevance: Tensor,  # [B, P] or [B, K, P]
    grid: tuple[int, int],
    pictures: Tensor,  # [B, H, W, 3] in [0,1]
    colormap: str,
    alpha: float,
    centred: bool = False,
) -> Tensor:
    """Heat maps over pictures, [B,(K,)H,W,3] uint8; `centred` puts a relevance of 0 in the colour map's middle."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a number in [0,1], got {alpha}")
    if not bool(torch.isfinite(relevance).all()):
        raise ValueError("relevance: contains NaN or Inf, which no colour stands for")
    heat = to_picture(relevance, grid, (pictures.shape[1], pictures.shape[2]), centred).float()
    colours = apply_colormap(heat, colormap)  # [B, (K,) H, W, 3]
    pictures = pictures.to(heat.device)
    if heat.dim() == 4:
        pictures = pictures.unsqueeze(1)
    blend = (1 - alpha) * pictures + alpha * colours
    return (blend * 255).round().to(torch.uint8)


def to_picture(
    relevance: Tensor,  # [B, (K,) P]
    grid: tuple[int, int],
    size: tuple[int, int],
    centred: bool = False,
) -> Tensor:
    leading = relevance.shape[:-1]
    dtype = relevance_dtype(relevance.dtype)
    maps = relevance.detach().to(dtype).reshape(-1, 1, *grid)
    if maps.shape[0] == 0:  # interpolate's empty-batch behaviour differs between devices and versions
        return maps.new_zeros(*leading, *size)
    large = functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    # Interpolation stays between its inputs but for rounding, which on a constant map would be all there is to see.
    large = large.clamp(maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True))
    low, high = large.amin((-2, -1), keepdim=True), large.amax((-2, -1), keepdim=True)
    if centred:
        high = torch.maximum(-low, high)
        return (0.5 + large / (2 * high + 1e-8)).reshape(*leading, *size)
    return ((large - low) / (high - low + 1e-8)).reshape(*leading, *size)
