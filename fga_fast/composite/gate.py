"""Gate in PyTorch's operators: `torch.median` is the lower median that the method asks for."""

from __future__ import annotations

import torch
from torch import Tensor


def gate(
    scores: Tensor,  # [M, P]
    base: float = 10.0,
    slope: float = 1.0,
) -> Tensor:
    """As `ops.gate`, on any device: gates [M, P] in [1/base, base], dtype of `scores`."""
    if scores.numel() == 0:
        return torch.empty_like(scores)
    deviation = scores - scores.median(dim=1, keepdim=True).values
    mad = deviation.abs().median(dim=1, keepdim=True).values  # [M, 1]
    return base ** torch.tanh(slope * (deviation / (1.4826 * (mad + 1e-8))))
