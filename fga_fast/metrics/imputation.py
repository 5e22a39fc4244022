"""Linear imputation: removed pixels become weighted means of their neighbours, so no grey shape shows what is gone.

The equations are solved for pixels, as they were published, not for one colour a patch. That would leave edges around
every patch, which are the very trace that imputation is to hide.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

MOST_STEPS = 10_000  # of conjugate gradients; holes of n pixels across take some multiple of n


def impute(
    images: Tensor,  # [b, C, H, W]
    removed: Tensor,  # [b, 1, H, W] bool
) -> Tensor:  # -> [b, C, H, W], of the images' dtype; without the noise
    """Removed pixels x_i from sum_j w_ij (x_i - x_j) = 0 over the up to eight neighbours j inside the image.

    w is 1/6 for neighbours at an edge and 1/12 for those at a corner. A pixel at the image's border has fewer
    neighbours, so its equation is divided by what is left of the weights. Conjugate gradients solve all images at once,
    to 1e-5 of the right-hand side, or 1e-10 for float64 images. An image of which nothing is left becomes 0.

    Source: Rong et al., A Consistent and Efficient Evaluation Strategy for Attribution Methods, ICML 2022
    (arXiv:2202.00449), section 4.
    """
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    hole = removed.to(wide.dtype)
    kept = 1 - hole
    # Measured from the mean of what is left, where the search also starts.
    middle = (wide * kept).sum((2, 3), keepdim=True) / kept.sum((2, 3), keepdim=True).clamp(min=1)
    known = (wide - middle) * kept
    weight = _neighbours(torch.ones_like(hole))
    tolerance = 1e-10 if wide.dtype == torch.float64 else 1e-5
    found = _solve(_neighbours(known) * hole, hole, weight, tolerance)
    return torch.where(removed, found + middle, wide).to(images.dtype)


def _solve(right: Tensor, hole: Tensor, weight: Tensor, tolerance: float) -> Tensor:
    """Conjugate gradients for (weight - neighbours) x = right on the pixels of `hole`, each channel on its own."""
    x, residual = torch.zeros_like(right), right.clone()
    direction, length = residual.clone(), _dot(residual, residual)
    enough = length * tolerance**2
    for number in range(MOST_STEPS):
        # Asked now and then, since the host waits for the answer.
        if number % 16 == 0 and not bool((length > enough).any()):
            break
        going = length > enough  # solved ones stand still, which keeps 0 / 0 out
        image = (weight * direction - _neighbours(direction)) * hole
        stride = torch.where(going, length / _dot(direction, image).where(going, 1), 0)
        x = x + stride * direction
        residual = residual - stride * image
        before, length = length, torch.where(going, _dot(residual, residual), length)
        direction = residual + torch.where(going, length / before.where(going, 1), 0) * direction
    return x


def _neighbours(values: Tensor) -> Tensor:  # [b, C, H, W] -> [b, C, H, W]
    """Weighted sum over the neighbours: (1 2 1) down times (1 2 1) across less the pixel itself, over 12."""
    padded = functional.pad(values, (1, 1, 1, 1))
    down = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    return (down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:] - 4 * values) / 12


def _dot(a: Tensor, b: Tensor) -> Tensor:  # -> [b, C, 1, 1]
    return (a * b).sum((2, 3), keepdim=True)
