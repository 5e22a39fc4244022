"""What takes the place of removed patches: images made from the clean ones, once a call."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from fga_fast.metrics.checks import check_among, check_finite

FillLike: TypeAlias = "str | float | Tensor"
NAMES = ("mean", "channel_mean", "black", "blur", "noise")


def fill_images(
    fill: FillLike,
    images: Tensor,  # [B, C, H, W]
    patch: tuple[int, int],  # height and width in pixels
    seed: int,
) -> Tensor:  # -> [B, 1 or C, 1 or H, 1 or W], of the images' dtype
    """The values that replace removed patches.

    Args:
        fill: "mean": one number an image, the mean over channels and pixels. "channel_mean": one for each channel.
            "black": the image's smallest value, which is black only if the image has black in it. For the value of
            black give it: (0 - mean) / std of the normalisation, a tensor [C]. "blur": the image under a Gaussian of
            one patch side as its standard deviation. "noise": normal noise with the mean and the standard deviation of
            each channel. Or a number, or a tensor [], [C], [1, C, H, W] or [B, C, H, W].
        seed: of the noise, which is the same on all devices.

    Raises:
        TypeError, ValueError: `fill` is none of these.
    """
    if isinstance(fill, str):
        check_among("fill", fill, NAMES)
        return _named(fill, images, patch, seed).to(images.dtype)
    try:
        given = torch.as_tensor(fill, dtype=images.dtype, device=images.device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"fill: expected one of {', '.join(NAMES)}, a number or a tensor, got {fill!r}") from None
    check_finite("fill", given)
    batch, channels, height, width = images.shape
    if given.dim() == 0:
        return given.expand(batch, 1, 1, 1)
    if given.shape == (channels,):
        return given.view(1, channels, 1, 1).expand(batch, -1, -1, -1)
    if given.shape in ((1, channels, height, width), (batch, channels, height, width)):
        return given.expand(batch, -1, -1, -1)
    raise ValueError(
        f"fill: expected a number, a tensor [{channels}], or one of the images' shape {list(images.shape)}, got "
        f"{list(given.shape)}"
    )


def _named(name: str, images: Tensor, patch: tuple[int, int], seed: int) -> Tensor:
    if name == "mean":
        return images.mean((1, 2, 3), keepdim=True, dtype=torch.float64)
    if name == "channel_mean":
        return images.mean((2, 3), keepdim=True, dtype=torch.float64)
    if name == "black":
        return images.amin((1, 2, 3), keepdim=True)
    if name == "blur":
        return blurred(images, patch)
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(images.shape, generator=generator, dtype=torch.float32, device="cpu").to(images.device)
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    return wide.mean((2, 3), keepdim=True) + noise * wide.std((2, 3), keepdim=True, correction=0)


def blurred(images: Tensor, sigma: tuple[float, float]) -> Tensor:  # [B, C, H, W] -> [B, C, H, W], at least float32
    """Images under a Gaussian of standard deviation `sigma` (down, across), cut at three of them."""
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    channels = wide.shape[1]
    for down in (True, False):
        deviation = sigma[0] if down else sigma[1]
        reach = math.ceil(3 * deviation)
        at = torch.arange(-reach, reach + 1, dtype=wide.dtype, device=wide.device)
        weights = torch.exp(-0.5 * (at / deviation) ** 2)
        kernel = (weights / weights.sum()).view((1, 1, -1, 1) if down else (1, 1, 1, -1)).repeat(channels, 1, 1, 1)
        edges = (0, 0, reach, reach) if down else (reach, reach, 0, 0)
        wide = functional.conv2d(functional.pad(wide, edges, mode="replicate"), kernel, groups=channels)
    return wide
