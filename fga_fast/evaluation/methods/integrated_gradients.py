"""Integrated Gradients, by Captum.

    relevance_p = sum_{pixels of patch p} x * integral_0^1 dy(a x)/dx da        the baseline is 0

M. Sundararajan, A. Taly, Q. Yan: Axiomatic Attribution for Deep Networks, ICML 2017, equation 1. The integral is
Captum's sum over Gauss-Legendre points. Zeros of a normalised image are the mean colour of its data set.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fga_fast.evaluation.methods.recorded import usable
from fga_fast.evaluation.subject import Method, Subject
from fga_fast.precision import relevance_dtype


def integrated_gradients(steps: int = 20) -> Method:
    """Integrated Gradients with one forward and one backward pass a step; signed.

    Args:
        steps: points of the integral, at least 1.

    The method raises:
        ImportError: Captum is not installed.
        ValueError: the model's patches do not divide its images, so that pixels are of no one patch.
    """

    def method(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:  # [B, channels, H, W] [B] -> [B, P]
        pixels: Tensor  # [B, channels, H, W]
        try:
            from captum.attr import IntegratedGradients  # type: ignore[import-not-found, import-untyped, unused-ignore]
        except ImportError as error:
            raise ImportError("integrated_gradients needs captum: pip install captum") from error
        plan = subject.explainer().plan
        (rows, columns), (height, width) = plan.check(images).grid, images.shape[-2:]
        if height % rows or width % columns:
            raise ValueError(
                f"integrated_gradients: pixels are summed over patches, but a grid of {rows} x {columns} does not "
                f"divide images of {height} x {width}"
            )

        def values(batch: Tensor, classes: Tensor) -> Tensor:  # [B, channels, H, W] [B] -> [B]
            return plan.readout.answer(classes, plan.readout.run(batch)).values

        with torch.inference_mode(False), torch.enable_grad():
            pixels = IntegratedGradients(values).attribute(
                usable(images), 0, additional_forward_args=targets, n_steps=steps, internal_batch_size=len(images)
            )
        of_patches = pixels.detach().to(relevance_dtype(images.dtype)).sum(1)  # [B, H, W]
        tiles = of_patches.reshape(len(images), rows, height // rows, columns, width // columns)
        return tiles.sum((2, 4)).flatten(1)

    return method
