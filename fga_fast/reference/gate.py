"""From the scores of an image's patches to the factors by which their relevance is multiplied."""

from __future__ import annotations

from torch import Tensor

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
