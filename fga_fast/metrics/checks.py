"""Checks of what metrics are given: errors name the argument, the expected, the found, the remedy."""

from __future__ import annotations

import math
import operator
from typing import Any, Literal

import torch
from torch import Tensor, nn

Variant = Literal["paper", "author"]


def check_model(model: object) -> None:
    """Refuses what cannot be called, and a model in train mode."""
    if not callable(model):
        raise TypeError(f"model: expected a module or function from images to logits, got {type(model).__name__}")
    if not isinstance(model, nn.Module):
        return
    for name, module in model.named_modules():
        if module.training:
            where = f"its part '{name}'" if name else "it"
            raise ValueError(
                f"model: expected eval mode, but {where} ({type(module).__name__}) is in train mode, so its numbers "
                "could be random or change the model; call model.eval() first"
            )


def check_images(images: Tensor) -> None:  # [B, C, H, W]
    """Refuses what are no finite images."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a tensor [B, C, H, W], got {type(images).__name__}; use torch.as_tensor()")
    if images.dim() != 4 or 0 in images.shape[1:]:
        raise ValueError(f"images: expected shape [B, C, H, W], got {list(images.shape)}; one image is images[None]")
    if not images.is_floating_point():
        raise ValueError(f"images: expected floats, normalised for the model, got {images.dtype}; preprocess them")
    check_finite("images", images)


def check_finite(name: str, values: Tensor) -> None:
    """Refuses NaN and Inf."""
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name}: expected finite numbers, got NaN or Inf; look for their cause before measuring")


def as_maps(relevance: Tensor, batch: int) -> Tensor:  # [B, P] or [M, B, P] -> [M, B, P] float64
    """Maps of M methods; a single method is M = 1."""
    if not isinstance(relevance, Tensor):
        raise TypeError(f"relevance: expected a tensor [B, P] or [M, B, P], got {type(relevance).__name__}")
    maps = relevance.detach().double()
    maps = maps.unsqueeze(0) if maps.dim() == 2 else maps
    if maps.dim() != 3 or maps.shape[1] != batch or 0 in (maps.shape[0], maps.shape[2]):
        raise ValueError(
            f"relevance: expected [B, P] or [M, B, P] with B = {batch} images, got {list(relevance.shape)}; of an "
            "Explanation with one target an image give e.relevance, of several methods torch.stack(maps)"
        )
    check_finite("relevance", maps)
    return maps


def grid_of(grid: tuple[int, int] | None, patches: int, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of the patches, checked: by default a square."""
    if grid is None:
        side = math.isqrt(patches)
        if side * side != patches:
            raise ValueError(
                f"grid: expected (rows, columns), since {patches} patches make no square; an Explanation has e.grid"
            )
        grid = (side, side)
    rows, columns = grid
    if rows < 1 or columns < 1 or rows * columns != patches:
        raise ValueError(f"grid: expected (rows, columns) of {patches} patches, as relevance has, got {tuple(grid)}")
    if size[0] % rows or size[1] % columns:
        raise ValueError(
            f"grid: expected patches that tile images of {size[0]} x {size[1]} pixels, got {rows} x {columns} patches; "
            "resize the images to a multiple of the grid"
        )
    return rows, columns


def check_variant(variant: str) -> None:
    """Refuses an unknown variant."""
    check_among("variant", variant, ("paper", "author"))


def check_among(name: str, value: object, known: tuple[str, ...]) -> None:
    """Refuses a value that is none of the known ones."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}")


def check_number(name: str, value: int, least: int, most: int | None = None) -> None:
    """Refuses what is no whole number from `least` to `most`."""
    try:
        fits = operator.index(value) >= least and (most is None or value <= most)
    except TypeError:
        raise TypeError(f"{name}: expected a whole number, got {value!r} ({type(value).__name__})") from None
    if not fits:
        raise ValueError(
            f"{name}: expected {f'at least {least}' if most is None else f'{least} to {most}'}, got {value}"
        )


def targets_of(targets: Any, logits: Tensor) -> Tensor:  # [B, classes] -> [B] int64
    """Class of each image: None is the predicted one."""
    batch, classes = logits.shape
    if targets is None:
        return logits.argmax(1)
    if not batch:  # no image has told the number of classes
        return logits.new_zeros(0, dtype=torch.int64)
    picked = torch.as_tensor(targets, device=logits.device)
    if picked.dtype == torch.bool or picked.is_floating_point() or picked.is_complex():
        raise TypeError(f"targets: expected None, an int or integers [B], got {picked.dtype}; convert with .long()")
    if picked.shape not in ((), (batch,)):
        raise ValueError(f"targets: expected None, an int or [B] with B = {batch} images, got {list(picked.shape)}")
    if picked.numel() and not 0 <= int(picked.min()) <= int(picked.max()) < classes:
        wrong = int(picked[(picked < 0) | (picked >= classes)].flatten()[0])
        raise ValueError(f"targets: expected classes 0 to {classes - 1}, got {wrong}; classes are counted from 0")
    return picked.long().expand(batch)
