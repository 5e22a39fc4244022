"""Linear imputation: removed pixels become weighted means of their neighbours, so no grey shape shows what is gone.

The equations are solved for pixels, as they were published, not for one colour a patch. That would leave edges around
every patch, which are the very trace that imputation is to hide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

MOST_STEPS = 10_000  # of conjugate gradients, against endless loops; patches take some ten steps, odd holes hundreds
ASKED_EVERY = 2  # steps between two looks at whether all is solved, since the host waits for the answer
DAMPING = 0.8  # of Jacobi's steps
SWEEPS = 8  # of them on the coarsest grid


def impute(
    images: Tensor,  # [b, C, H, W]
    removed: Tensor,  # [b, 1, H, W] bool
    patch: tuple[int, int] = (1, 1),
) -> Tensor:  # -> [b, C, H, W], of the images' dtype; without the noise
    """Removed pixels x_i from sum_j w_ij (x_i - x_j) = 0 over the up to eight neighbours j inside the image.

    w is 1/6 for neighbours at an edge and 1/12 for those at a corner. All images are solved at once, to 1e-4 of the
    right-hand side, which leaves errors far below the noise; float64 images to 1e-10. An image of which nothing is left
    becomes 0.

    Source: Rong et al., A Consistent and Efficient Evaluation Strategy for Attribution Methods, ICML 2022
    (arXiv:2202.00449), section 4.

    Args:
        patch: height and width of the rectangles that are removed as a whole; it decides how fast this is, no more.
    """
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    hole = removed.to(wide.dtype)
    kept = 1 - hole
    # Measured from the mean of what is left, where the search also starts.
    middle = (wide * kept).sum((2, 3), keepdim=True) / kept.sum((2, 3), keepdim=True).clamp(min=1)
    right = _neighbours((wide - middle) * kept) * hole
    found = _solve(right, _grids(hole, patch), 1e-10 if wide.dtype == torch.float64 else 1e-4)
    return torch.where(removed, found + middle, wide).to(images.dtype)


@dataclass(frozen=True)
class _Grid:
    """The equations on one grid. Coarser ones have the same form, with the sums of residuals as right-hand sides."""

    hole: Tensor  # [b, 1, h, w], 1 at unknowns and 0 elsewhere
    weight: Tensor  # [b, 1, h, w], sum of the weights of the neighbours inside the image
    pool: tuple[int, int]  # how many cells of it make one of the next grid

    def times(self, x: Tensor) -> Tensor:
        """The left-hand side."""
        return (self.weight * x - _neighbours(x)) * self.hole

    def smoothed(self, x: Tensor, right: Tensor) -> Tensor:
        """One step of Jacobi's iteration."""
        return x + DAMPING * (right - self.times(x)) / self.weight


def _grids(hole: Tensor, patch: tuple[int, int]) -> list[_Grid]:
    """From pixels to patches, by the prime factors of a patch's sides."""
    grids = []
    while True:
        pool = tuple(next((f for f in range(2, side + 1) if side % f == 0), 1) for side in patch)
        # A single pixel in all has no neighbours and no equation.
        weight = _neighbours(torch.ones_like(hole)).clamp(min=1 / 12)
        grids.append(_Grid(hole, weight, (pool[0], pool[1])))
        if pool == (1, 1):
            return grids
        hole, patch = hole[..., :: pool[0], :: pool[1]], (patch[0] // pool[0], patch[1] // pool[1])


def _cycle(right: Tensor, grids: list[_Grid]) -> Tensor:
    """Roughly the solution: smoothed, corrected on coarser grids, smoothed. It is symmetric, as the search needs."""
    grid = grids[0]
    x = DAMPING * right / grid.weight
    if len(grids) == 1:
        for _ in range(SWEEPS):
            x = grid.smoothed(x, right)
        return x
    residual, (tall, wide) = right - grid.times(x), grid.pool
    coarse = _cycle(functional.avg_pool2d(residual, grid.pool) * (tall * wide), grids[1:])
    x = x + coarse.repeat_interleave(tall, 2).repeat_interleave(wide, 3)
    return grid.smoothed(x, right)


def _solve(right: Tensor, grids: list[_Grid], tolerance: float) -> Tensor:
    """Conjugate gradients, preconditioned by a cycle through the grids; each image and channel on its own."""
    x, residual = torch.zeros_like(right), right
    direction = near = _cycle(residual, grids)
    product, enough = _dot(residual, near), _dot(right, right) * tolerance**2
    for number in range(MOST_STEPS):
        going = _dot(residual, residual) > enough  # solved ones stand still, which keeps 0 / 0 out
        if number % ASKED_EVERY == 0 and not bool(going.any()):
            break
        image = grids[0].times(direction)
        stride = torch.where(going, product / _dot(direction, image).where(going, 1), 0)
        x, residual = x + stride * direction, residual - stride * image
        near = _cycle(residual, grids)
        before, product = product, torch.where(going, _dot(residual, near), product)
        direction = near + torch.where(going, product / before.where(going, 1), 0) * direction
    return x


def _neighbours(values: Tensor) -> Tensor:  # [b, C, h, w] -> [b, C, h, w]
    """Weighted sum over the neighbours: (1 2 1) down times (1 2 1) across less the pixel itself, over 12."""
    padded = functional.pad(values, (1, 1, 1, 1))
    down = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    return (down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:] - 4 * values) / 12


def _dot(a: Tensor, b: Tensor) -> Tensor:  # -> [b, C, 1, 1]
    return (a * b).sum((2, 3), keepdim=True)
