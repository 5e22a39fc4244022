"""Localisation: does relevance lie where the object is?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fga_fast.metrics.checks import as_maps, grid_of


class Localisation(NamedTuple):
    """[B] or [M, B] float64; higher is better."""

    inside: Tensor  # share of the positive relevance that lies in the mask, in [0, 1]
    pointing: Tensor  # 1 where the middle of the most relevant patch lies in the mask, else 0


def localisation(
    relevance: Tensor,  # [B, P] or [M, B, P]
    mask: Tensor,  # [B, H, W] bool, or boxes [B, 4]
    *,
    image_size: tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
) -> Localisation:
    """Relevance inside a mask or box, and the pointing game. No model is run.

    A patch that lies in the mask in part counts in part. The middle of a patch is its pixel (height // 2, width // 2).
    Of equally relevant patches the first is the most relevant one.

    Source: Zhang et al., Top-down Neural Attention by Excitation Backprop, ECCV 2016 (pointing game, here without its
    tolerance of 15 pixels); Arras et al., Information Fusion 2022 (relevance mass).

    Args:
        relevance: one map an image, or those of M methods.
        mask: pixels of the object, in the model's image; or one box an image: left, top, right, bottom in pixels, right
            and bottom not included.
        image_size: (height, width) of the model's image; needed for boxes only.
        grid: (rows, columns) of the patches; by default a square.

    Returns:
        `inside` is NaN where no relevance is positive.

    Raises:
        TypeError, ValueError: an argument is wrong; its name comes first.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a tensor [B, H, W] or boxes [B, 4], got {type(mask).__name__}")
    maps = as_maps(relevance, len(mask)).to(mask.device)
    pixels = _pixels(mask, image_size)
    rows, columns = grid_of(grid, maps.shape[2], (pixels.shape[1], pixels.shape[2]))
    tall, wide = pixels.shape[1] // rows, pixels.shape[2] // columns
    tiles = (
        pixels.reshape(-1, rows, tall, columns, wide) if len(pixels) else pixels.new_zeros(0, rows, tall, columns, wide)
    )
    covered = tiles.double().mean((2, 4)).flatten(1)  # [B, P]
    middle = tiles[:, :, tall // 2, :, wide // 2].flatten(1)  # [B, P]
    positive = maps.clamp(min=0)
    total = positive.sum(-1)
    inside = torch.where(total > 0, (positive * covered).sum(-1) / total.where(total > 0, 1), torch.nan)
    # Not argmax, which gives any of equal ones on some devices.
    top = maps.argsort(dim=-1, descending=True, stable=True)[..., :1]
    pointing = middle.expand_as(maps).gather(-1, top)[..., 0].double()
    return Localisation(*(values[0] if relevance.dim() == 2 else values for values in (inside, pointing)))


def _pixels(mask: Tensor, size: tuple[int, int] | None) -> Tensor:  # [B, H, W] or [B, 4] -> [B, H, W] bool
    """The mask, checked; boxes as masks."""
    if mask.dim() == 3:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected bool [B, H, W], got {mask.dtype}; give mask > 0, or whatever is inside")
        return mask
    if mask.dim() != 2 or mask.shape[1] != 4:
        raise ValueError(f"mask: expected [B, H, W] or boxes [B, 4], got {list(mask.shape)}")
    if size is None:
        raise ValueError("image_size: expected (height, width) of the model's image, since mask holds boxes")
    left, top, right, bottom = (side.view(-1, 1, 1) for side in mask.unbind(1))
    if bool(((right <= left) | (bottom <= top)).any()):
        raise ValueError("mask: expected boxes (left, top, right, bottom) with left < right and top < bottom")
    y, x = (torch.arange(length, device=mask.device) for length in size)
    y, x = y.view(1, -1, 1), x.view(1, 1, -1)
    return (x >= left) & (x < right) & (y >= top) & (y < bottom)
