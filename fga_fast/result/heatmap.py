"""Relevance as pictures: heat maps, and heat maps over images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fga_fast.precision import relevance_dtype
from fga_fast.result.colours import apply_colormap


def paint(
    relevance: Tensor,  # [M, P]
    grid: tuple[int, int],
    pictures: Tensor,  # [M, H, W, 3] in [0,1]
    colormap: str,
    alpha: float,
    centred: bool = False,
) -> Tensor:  # -> [M, H, W, 3] uint8
    """Heat maps over pictures; `centred` puts a relevance of 0 in the middle of the colour map.

    Diverging colours always have 0 in the middle, and let the picture through there.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a number in [0,1], got {alpha}")
    if not bool(torch.isfinite(relevance).all()):
        raise ValueError("relevance: contains NaN or Inf, which have no colour; look for their cause in the model")
    diverging = colormap == "diverging"
    heat = to_picture(relevance, grid, (pictures.shape[1], pictures.shape[2]), centred or diverging).float()
    weight = torch.full_like(heat, alpha)
    if diverging:
        weight *= (4 * heat - 2).abs().clamp(max=1)
    blend = torch.lerp(pictures.to(heat.device), apply_colormap(heat, colormap), weight.unsqueeze(-1))
    return (blend * 255).round().to(torch.uint8)


def to_picture(
    relevance: Tensor,  # [..., P]
    grid: tuple[int, int],
    size: tuple[int, int],
    centred: bool = False,
) -> Tensor:  # -> [..., H, W]
    """Relevance at every pixel, scaled to [0,1] map by map; `centred` gives a relevance of 0 the value 0.5."""
    leading = relevance.shape[:-1]
    dtype = relevance_dtype(relevance.dtype)
    maps = relevance.detach().to(dtype).reshape(-1, 1, *grid)
    if maps.shape[0] == 0:  # interpolate treats an empty batch differently from device to device and version to version
        return maps.new_zeros(*leading, *size)
    large = functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    # Only rounding takes interpolated values outside their inputs. On a constant map it would be all there is to see.
    large = large.clamp(maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True))
    low, high = large.amin((-2, -1), keepdim=True), large.amax((-2, -1), keepdim=True)
    if centred:
        low, high = -torch.maximum(-low, high), torch.maximum(-low, high)
    extent = high - low
    # What differs by rounding only is the same everywhere: 0, or 0.5 if centred.
    seen = extent > 8 * torch.finfo(dtype).eps * torch.maximum(-low, high)
    found = ((large - low) / extent.where(seen, 1)).where(seen, 0.5 if centred else 0.0)
    return found.reshape(*leading, *size)
