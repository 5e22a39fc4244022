"""Salience-guided faithfulness coefficient (SaCo): do more relevant patches move the prediction more?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fga_fast.metrics.checks import Variant, check_number, check_variant
from fga_fast.metrics.fills import FillLike
from fga_fast.metrics.order import places
from fga_fast.metrics.perturb import Model, Probability, prepare


def saco(
    model: Model,
    images: Tensor,  # [B, C, H, W]
    targets: Any,
    relevance: Tensor,  # [B, P] or [M, B, P]
    *,
    bins: int = 10,
    variant: Variant = "paper",
    fill: FillLike = "mean",
    probability: Probability = "softmax",
    grid: tuple[int, int] | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> Tensor:  # -> [B] or [M, B] float64
    """SaCo of each image, in [-1, 1]; higher is better.

    Patches, sorted by relevance, are cut into `bins` groups of equal size, give or take one. s is the relevance of a
    group, v the drop of the target's probability when the group is removed. Each pair of groups has the weight
    s_i - s_j, i before j, counted as negative where v_i < v_j. SaCo is the sum of the weights over that of their sizes.
    It depends on the values of a map, not only on their order. So give maps as they come from the method.

    Source: Wu et al., On the Faithfulness of Vision Transformer Explanations, CVPR 2024 (arXiv:2404.01415).

    Args:
        model: images to logits [B, classes], in eval mode.
        images: normalised for the model, of its dtype and device.
        targets: None for the predicted class of the clean image, an int, or integers [B].
        relevance: one map an image, or those of M methods.
        bins: number of groups, 2 to P. Take one that divides P: else the first groups have a patch more, and a random
            map gets a SaCo above 0. The author's runs have ceil(P / 4).
        variant: "author" takes the drop of the largest probability, of whatever class.
        fill: what replaces patches, see `fills.fill_images`.
        probability: of the logits; "sigmoid" for a model whose classes do not exclude each other.
        grid: (rows, columns) of the patches; by default a square.
        batch_size: images in a forward pass.
        seed: of `fill="noise"`.

    Returns:
        NaN ("paper") or 0 ("author") where all groups are equally relevant, since then there is nothing to judge.

    Raises:
        TypeError, ValueError: an argument is wrong; its name comes first.
    """
    check_variant(variant)
    trial = prepare(model, images, targets, relevance, grid, batch_size, probability)
    patches = trial.maps.shape[2]
    check_number("bins", bins, 2, patches)
    groups = torch.arange(bins, device=images.device)
    sizes = patches // bins + (groups < patches % bins).long()  # the first ones have one more
    removed = groups.repeat_interleave(sizes)[places(trial.maps)] == groups.view(-1, 1, 1, 1)  # [bins, M, B, P]
    s = (trial.maps * removed).sum(-1)  # [bins, M, B]
    found, clean = trial.respond(removed, trial.fill(fill, seed)), trial.clean
    if variant == "paper":
        return trial.shaped(_coefficient(s, clean.probability - found.probability, torch.nan))
    return trial.shaped(_coefficient(s, clean.largest - found.largest, 0.0))


def _coefficient(s: Tensor, v: Tensor, undefined: float) -> Tensor:  # [bins, M, B], [bins, M, B] -> [M, B]
    """Signed over absolute weights of all pairs of groups, one group and those after it at a time."""
    signed, absolute = torch.zeros_like(s[0]), torch.zeros_like(s[0])
    for i in range(len(s) - 1):
        weight = s[i] - s[i + 1 :]
        signed += torch.where(v[i] >= v[i + 1 :], weight, -weight).sum(0)
        absolute += weight.abs().sum(0)
    return torch.where(absolute > 0, signed / absolute.where(absolute > 0, 1), undefined)
