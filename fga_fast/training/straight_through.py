"""A step and a jump whose thresholds have gradients, estimated over a window (Rajamanoharan et al. 2024).

The derivative of a step is zero nearly everywhere, but not that of its mean over many tokens: where a threshold moves,
it passes tokens. The rectangle of height 1 / bandwidth around it estimates how many (arXiv:2407.14435, eq. 11 and 12).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def step(z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """1 where z > theta, else 0; with a gradient of theta only.

    Args:
        z: any shape.
        theta: that of z, or [F] if z is [T, F].
        bandwidth: of the window, above 0.
    """
    stepped: Tensor = _Step.apply(z, theta, bandwidth)  # type: ignore[no-untyped-call]
    return stepped


def jump(z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """z where z > theta, else 0; see `step`. The gradient of z is that of the open parts."""
    jumped: Tensor = _Jump.apply(z, theta, bandwidth)  # type: ignore[no-untyped-call]
    return jumped


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        return (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        z, theta = ctx.saved_tensors
        return None, _of_theta(-gradients[0], z, theta, ctx.bandwidth), None


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        return torch.where(z > theta, z, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        z, theta = ctx.saved_tensors
        (d,) = gradients
        return torch.where(z > theta, d, 0), _of_theta(-theta * d, z, theta, ctx.bandwidth), None


def _of_theta(d: Tensor, z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    inside = torch.where((z - theta).abs() < bandwidth / 2, d / bandwidth, 0)
    return inside.sum_to_size(theta.shape)
