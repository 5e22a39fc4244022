"""Grad-CAM on the residual stream.

    alpha_c = mean_p g_pc        relevance_p = relu(sum_c alpha_c x_pc)

R. R. Selvaraju et al.: Grad-CAM: Visual Explanations from Deep Networks via Gradient-Based Localization, ICCV 2017,
equations 1 and 2, with channels of the residual stream for feature maps and patches for their places.
"""

from __future__ import annotations

from torch import Tensor

from fga_fast.evaluation.methods.recorded import record
from fga_fast.evaluation.subject import Method, Subject


def grad_cam(block: int | None = None) -> Method:
    """Grad-CAM at the output of a block. All of a map may be 0: the relu drops what speaks against the target.

    Args:
        block: from 0. None: what enters the last block that the head reads. A class token's head has no gradient at the
            patches after that block, so the map would be zero there.
    """

    def method(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:  # [B, channels, H, W] [B] -> [B, P]
        found = record(subject, images, targets)
        x, g = found.before(found.deepest) if block is None else found.after(block)  # [B, P, C]
        return (x * g.mean(1, keepdim=True)).sum(-1).clamp(min=0)

    return method
