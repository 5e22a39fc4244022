"""Faithfulness correlation: is the relevance of random patches a measure of what the logit loses without them?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fga_fast.metrics.checks import Variant, check_number, check_variant
from fga_fast.metrics.correlation import pearson, spearman
from fga_fast.metrics.fills import FillLike
from fga_fast.metrics.perturb import Model, prepare


def faithfulness_correlation(
    model: Model,
    images: Tensor,  # [B, C, H, W]
    targets: Any,
    relevance: Tensor,  # [B, P] or [M, B, P]
    *,
    runs: int = 100,
    subset_size: int = 20,
    subsets: Tensor | None = None,  # [runs, B, subset_size] int64
    variant: Variant = "paper",
    fill: FillLike = "mean",
    grid: tuple[int, int] | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> Tensor:  # -> [B] or [M, B] float64
    """Correlation over random subsets of patches, in [-1, 1]; higher is better.

    It correlates the summed relevance of a subset with the drop of the target's logit when the subset is removed. All
    methods are asked about the same subsets. With n runs the standard error of an image's value is about 1 / sqrt(n).

    Source: Bhatt et al., Evaluating and Aggregating Feature-based Model Explanations, IJCAI 2020 (arXiv:2005.00631).

    Args:
        model: images to logits [B, classes], in eval mode.
        images: normalised for the model, of its dtype and device.
        targets: None for the predicted class of the clean image, an int, or integers [B].
        relevance: one map an image, or those of M methods.
        runs: subsets for each image, at least 2.
        subset_size: patches in a subset, 1 to P. The author's runs have 20 of 196 and 10 of 49.
        subsets: the subsets themselves; then `runs`, `subset_size` and `seed` say nothing about them.
        variant: "paper" is Pearson's correlation; "author" is Spearman's, and 0 where it is undefined.
        fill: what replaces patches, see `fills.fill_images`.
        grid: (rows, columns) of the patches; by default a square.
        batch_size: images in a forward pass.
        seed: of the subsets, which are the same on all devices, and of `fill="noise"`.

    Returns:
        NaN ("paper") where relevance or drops are the same for all subsets.

    Raises:
        TypeError, ValueError: an argument is wrong; its name comes first.
    """
    check_variant(variant)
    trial = prepare(model, images, targets, relevance, grid, batch_size)
    maps = trial.maps
    if subsets is None:
        check_number("runs", runs, 2)
        check_number("subset_size", subset_size, 1, maps.shape[2])
        subsets = _drawn(runs, maps.shape[1], maps.shape[2], subset_size, seed)
    removed = _marked(subsets.to(images.device), maps)  # [runs, B, P]
    found = trial.respond(removed, trial.fill(fill, seed))
    drop = (trial.clean.logit - found.logit).t().expand(len(maps), -1, -1)  # [M, B, runs]
    total = torch.einsum("mbp,rbp->mbr", maps, removed.double())
    if variant == "paper":
        return trial.shaped(pearson(total, drop))
    return trial.shaped(spearman(total, drop).nan_to_num(nan=0.0))


def _drawn(runs: int, batch: int, patches: int, size: int, seed: int) -> Tensor:  # -> [runs, B, size] int64
    """Random subsets of distinct patches."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.rand(runs, batch, patches, generator=generator, device="cpu").argsort(-1)[..., :size]


def _marked(subsets: Tensor, maps: Tensor) -> Tensor:  # [runs, B, size], [M, B, P] -> [runs, B, P] bool
    """Subsets as masks, checked."""
    _, batch, patches = maps.shape
    if subsets.dim() != 3 or subsets.shape[1] != batch or len(subsets) < 2 or not subsets.shape[2]:
        raise ValueError(
            f"subsets: expected [runs, B, size] with B = {batch} images and at least 2 runs, got {list(subsets.shape)}"
        )
    if subsets.dtype != torch.int64:
        raise TypeError(f"subsets: expected int64, got {subsets.dtype}; convert with .long()")
    if subsets.numel() and not 0 <= int(subsets.min()) <= int(subsets.max()) < patches:
        raise ValueError(
            f"subsets: expected patches 0 to {patches - 1}, got {int(subsets.min())} to {int(subsets.max())}"
        )
    removed = torch.zeros(len(subsets), batch, patches, dtype=torch.bool, device=subsets.device)
    removed.scatter_(2, subsets, True)
    if bool((removed.sum(-1) != subsets.shape[2]).any()):
        raise ValueError("subsets: expected distinct patches in each subset, got one twice; draw without replacement")
    return removed
