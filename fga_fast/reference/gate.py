"""From the scores of an image's patches to the factors by which their relevance is multiplied."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fga_fast.settings import SMALL_GRADIENT

_MAD_TO_STD = 1.4826  # for a normal distribution, 1.4826 * MAD is the standard deviation
_EPSILON = 1e-8  # keeps an image whose scores are all equal at z = 0


def robust_z(scores: Tensor) -> Tensor:  # [M, P] -> [M, P]
    """Distance from the median in robust standard deviations, for each image over its patches.

    Equation: `z = (s - med) / (1.4826 (MAD + 1e-8))`, `med` the lower median of the image's scores (torch.median, an
    element of s also for even P), `MAD` the lower median of `|s - med|`.
    """
    if scores.shape[1] == 0:
        raise ValueError(f"scores: expected [M, P] with at least one patch, got {tuple(scores.shape)}")
    median = scores.median(dim=1, keepdim=True).values  # [M, 1]
    deviation = scores - median
    mad = deviation.abs().median(dim=1, keepdim=True).values  # [M, 1]
    return deviation / (_MAD_TO_STD * (mad + _EPSILON))


def unit(gradient: Tensor) -> Tensor:  # [B, P, C] -> [B, 1] float64
    """What scores are measured in before they become gates, so that the constant in z does not drown small signals.

    Equation: `u = 1`, but where `m = max |g|` of an image is below `SMALL_GRADIENT`, `u = 2 ** floor(log2(m /
    SMALL_GRADIENT))`, the power of two below the ratio (at least 2 ** -100). The gate is that of `s / u`.
    """
    found = []
    for image in gradient.double():
        ratio = min(max(float(image.abs().max()) / SMALL_GRADIENT, 2.0**-100), 1.0)
        found.append([2.0 ** math.floor(math.log2(ratio))])
    return torch.tensor(found, dtype=torch.float64, device=gradient.device).reshape(-1, 1)


def gate(
    scores: Tensor,  # [M, P]
    base: float,
    slope: float,
) -> Tensor:
    """Factor for each patch's relevance.

    Equation: `w = base ** tanh(slope * z)`, with z from `robust_z`.

    Returns:
        w [M, P], in [1 / base, base], in the dtype of `scores`; 1 at the median patch.

    Raises:
        ValueError: there is no patch.
    """
    exponent = (slope * robust_z(scores)).tanh()
    return base**exponent
