"""Insertion and deletion: how fast does the prediction come and go with the most relevant patches?"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fga_fast.metrics.checks import check_number
from fga_fast.metrics.fills import FillLike
from fga_fast.metrics.order import area, first, places, steps
from fga_fast.metrics.perturb import Model, Probability, prepare


class InsertionDeletion(NamedTuple):
    """Mean probability of the target, [B] or [M, B] float64 in [0, 1]."""

    insertion: Tensor  # higher is better
    deletion: Tensor  # lower is better


def insertion_deletion(
    model: Model,
    images: Tensor,  # [B, C, H, W]
    targets: Any,
    relevance: Tensor,  # [B, P] or [M, B, P]
    *,
    step: int = 1,
    insertion_fill: FillLike = "blur",
    deletion_fill: FillLike = "mean",
    probability: Probability = "softmax",
    grid: tuple[int, int] | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> InsertionDeletion:
    """Areas under the target's probability while patches are inserted or deleted, the most relevant ones first.

    Insertion starts from an image that is all `insertion_fill`, deletion from the clean one. Both are trapezoid areas,
    with the first and the last point, over the share of patches.

    Source: Petsiuk et al., RISE, BMVC 2018 (arXiv:1806.07421): a blurred image for insertion, and a constant for
    deletion, which is 0 in units of the normalised image there (`deletion_fill=0.0`).

    Args:
        model: images to logits [B, classes], in eval mode.
        images: normalised for the model, of its dtype and device.
        targets: None for the predicted class of the clean image, an int, or integers [B].
        relevance: one map an image, or those of M methods.
        step: patches at a time; more of them need fewer forward passes.
        insertion_fill, deletion_fill: what is there instead of patches, see `fills.fill_images`.
        probability: of the logits; "sigmoid" for a model whose classes do not exclude each other.
        grid: (rows, columns) of the patches; by default a square.
        batch_size: images in a forward pass.
        seed: of a fill of "noise".

    Raises:
        TypeError, ValueError: an argument is wrong; its name comes first.
    """
    trial = prepare(model, images, targets, relevance, grid, batch_size, probability)
    patches = trial.maps.shape[2]
    check_number("step", step, 1, patches)
    counts = steps(patches, step)
    removed = first(places(trial.maps), counts)  # [K, M, B, P]
    inserted = trial.respond(~removed, trial.fill(insertion_fill, seed)).probability
    deleted = trial.respond(removed, trial.fill(deletion_fill, seed)).probability
    return InsertionDeletion(*(trial.shaped(area(curve, counts) / patches) for curve in (inserted, deleted)))
