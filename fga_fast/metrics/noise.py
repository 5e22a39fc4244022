"""Noise for images, the same on all devices: from one seed, or from one for each image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

# torch.rand or torch.randn -> one float32 number for each number of the images, on the CPU
Draw: TypeAlias = Callable[[Callable[..., Tensor]], Tensor]


def drawn_for(images: Tensor, seed: int | Sequence[int]) -> Draw:  # [B, C, H, W]
    """A function that draws noise of the images' shape, other noise at each call.

    Args:
        seed: with one for each image, an image's noise does not depend on its neighbours in the batch.

    Raises:
        ValueError: another number of seeds than of images.
    """

    def from_one(seed: int, shape: torch.Size) -> Draw:
        generator = torch.Generator("cpu").manual_seed(seed)
        return lambda draw: draw(shape, generator=generator, dtype=torch.float32, device="cpu")

    if isinstance(seed, int):
        return from_one(seed, images.shape)
    if len(seed) != len(images):
        raise ValueError(f"seed: expected one, or one for each of the {len(images)} images, got {len(seed)}")
    if not seed:
        return from_one(0, images.shape)
    each = [from_one(one, images.shape[1:]) for one in seed]
    return lambda draw: torch.stack([of_image(draw) for of_image in each])
