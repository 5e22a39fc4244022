"""`Explainer` behind the interfaces of other libraries: captum, pytorch-grad-cam and Quantus.

Each module is one adapter without mathematics of its own, and none of them is imported by `import fga_fast`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fga_fast.result.explanation import Explanation


def as_images(
    inputs: Tensor | NDArray[Any],  # [B, channels, H, W] or [B, H, W, channels]
    like: Tensor,
    channels: int,
    channel_first: bool | None = None,
) -> Tensor:  # [B, channels, H, W]
    """Images as `Explainer` takes them, on the model's device; NumPy arrays also in the model's dtype.

    Args:
        inputs: normalised images; NumPy arrays of any float dtype and strides, never changed.
        like: a weight of the model; it says the device and, for NumPy arrays, the dtype.
        channels: channels the model takes.
        channel_first: None reads it from the shape, channels first where both fit.

    Raises:
        TypeError: neither a tensor nor a NumPy array of floats.
    """
    if isinstance(inputs, np.ndarray):
        if inputs.dtype.kind != "f":
            raise TypeError(f"inputs: expected floats, normalised as the model wants them, got dtype {inputs.dtype}")
        # A copy, since torch takes no negative strides or foreign byte orders; float64 holds all narrower types.
        images = torch.from_numpy(np.array(inputs, dtype=np.float64, order="C")).to(like)
    elif isinstance(inputs, Tensor):
        images = inputs.to(like.device)
    else:
        raise TypeError(f"inputs: expected a tensor or a NumPy array of images, got {type(inputs).__name__}")
    if channel_first is None:
        channel_first = not (images.dim() == 4 and images.shape[1] != channels and images.shape[3] == channels)
    return images if channel_first else images.movedim(-1, 1)


def as_pixels(e: Explanation, images: Tensor) -> Tensor:  # [B, channels, H, W] -> [B, 1, H, W]
    """Raw relevance at every pixel: bilinear (`align_corners=False`), neither rescaled nor divided among pixels.

    Raises:
        ValueError: several targets an image.
    """
    maps = e.single().shown.reshape(len(e), 1, *e.grid)
    return functional.interpolate(maps, size=images.shape[2:], mode="bilinear", align_corners=False)
