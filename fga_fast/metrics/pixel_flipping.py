"""Pixel flipping: how fast does the prediction go when the most relevant patches go first?"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fga_fast.metrics.checks import Variant, check_among, check_number, check_variant
from fga_fast.metrics.fills import FillLike
from fga_fast.metrics.order import area, first, places, steps
from fga_fast.metrics.perturb import Fill, Model, Probability, Trial, prepare


def pixel_flipping(
    model: Model,
    images: Tensor,  # [B, C, H, W]
    targets: Any,
    relevance: Tensor,  # [B, P] or [M, B, P]
    *,
    variant: Variant = "paper",
    step: int = 1,
    order: Literal["most", "least", "zero"] = "most",
    output: Literal["probability", "logit"] = "probability",
    normalise: bool = False,
    fill: FillLike = "mean",
    probability: Probability = "softmax",
    grid: tuple[int, int] | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> Tensor:  # -> [B] or [M, B] float64
    """Area under the target's probability while patches are removed one after the other; lower is better.

    Removed patches stay removed. The area is the trapezoid's over the number of removed patches, from none to all, so
    the clean image is its first point. It lies in [0, P]; `normalise` divides it by P, for models of different grids.

    Source: Bach et al., On Pixel-Wise Explanations, PLoS ONE 2015, which removes pixels in the order of relevance and
    shows the curve; Samek et al., IEEE TNNLS 2017, for the area.

    Args:
        model: images to logits [B, classes], in eval mode.
        images: normalised for the model, of its dtype and device.
        targets: None for the predicted class of the clean image, an int, or integers [B].
        relevance: one map an image, or those of M methods.
        variant: "paper" takes what replaces patches from the clean image. "author" takes the mean of the image as it is
            before each step, with the patches that are already replaced; it removes one patch at a time and needs
            `fill="mean"`.
        step: patches removed at a time.
        order: the most relevant patches first, the least relevant ones (then higher is better), or those nearest to 0.
        output: the curve is the target's probability or its logit (no range is known).
        fill: what replaces patches, see `fills.fill_images`.
        probability: of the logits; "sigmoid" for a model whose classes do not exclude each other.
        grid: (rows, columns) of the patches; by default a square.
        batch_size: images in a forward pass.
        seed: of `fill="noise"`.

    Raises:
        TypeError, ValueError: an argument is wrong; its name comes first.
    """
    check_variant(variant)
    check_among("order", order, ("most", "least", "zero"))
    check_among("output", output, ("probability", "logit"))
    trial = prepare(model, images, targets, relevance, grid, batch_size, probability)
    maps = trial.maps
    check_number("step", step, 1, maps.shape[2])
    place = places({"most": maps, "least": -maps, "zero": -maps.abs()}[order])
    counts = steps(maps.shape[2], step)
    removed = first(place, counts)  # [K, M, B, P]
    if variant == "author":
        found = trial.respond(removed, _running_mean(trial, place, step, fill), owners=place[..., 0].numel())
    else:
        found = trial.respond(removed, trial.fill(fill, seed))
    size = area(found.probability if output == "probability" else found.logit, counts)
    return trial.shaped(size / maps.shape[2] if normalise else size)


def _running_mean(trial: Trial, place: Tensor, step: int, fill: FillLike) -> Fill:  # [M, B, P]
    """The mean of the image just before each patch was removed, without making that image.

    With P patches of means a_1, a_2, ... in the order of removal, the mean goes m_k = m_(k-1) + (m_(k-1) - a_k) / P. So
    q^-k m_k, where q = 1 + 1/P, falls by q^-k a_k / P at each step. q^P is below e, so no digits are lost.
    """
    if step != 1 or not (isinstance(fill, str) and fill == "mean"):
        raise ValueError(
            f'step, fill: variant="author" is defined for step=1 and fill="mean", got step={step} and fill={fill!r}; '
            'use variant="paper"'
        )
    methods, batch, patches = place.shape
    of_patch = trial.tiles(trial.images).mean((1, 3, 5), dtype=torch.float64).flatten(1)  # [B, P]
    in_order = of_patch.expand(methods, -1, -1).gather(2, place.argsort(-1))  # [M, B, P]
    growth = (1 + 1 / patches) ** torch.arange(patches + 1, dtype=torch.float64, device=place.device)
    fallen = (in_order / growth[1:] / patches).cumsum(-1)
    mean = of_patch.mean(-1, keepdim=True)
    before = growth[:-1] * torch.cat([mean.expand(methods, batch, 1), mean - fallen[..., :-1]], dim=-1)
    values = before.gather(2, place).flatten(0, 1).to(trial.images.dtype)  # [M * B, P]
    rows, columns = trial.grid
    return lambda owner, _removed: values[owner].view(-1, 1, rows, 1, columns, 1)
