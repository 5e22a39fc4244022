"""Remove and debias (ROAD): the prediction without the most and without the least relevant patches, imputed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fga_fast.metrics.checks import check_among
from fga_fast.metrics.imputation import impute
from fga_fast.metrics.noise import drawn_for
from fga_fast.metrics.order import first, places
from fga_fast.metrics.perturb import Fill, Model, Probability, Trial, prepare

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Road(NamedTuple):
    """Mean over the removed shares, [B] or [M, B] float64 in [0, 1]."""

    most_first: Tensor  # without the most relevant patches; lower is better
    least_first: Tensor  # without the least relevant patches; higher is better


def road(
    model: Model,
    images: Tensor,  # [B, C, H, W]
    targets: Any,
    relevance: Tensor,  # [B, P] or [M, B, P]
    *,
    shares: Sequence[float] = SHARES,
    output: Literal["probability", "accuracy"] = "probability",
    noise: float = 0.01,
    probability: Probability = "softmax",
    grid: tuple[int, int] | None = None,
    batch_size: int = 64,
    seed: int | Sequence[int] = 0,
) -> Road:
    """The target's probability when shares of the patches are replaced by noisy linear imputation.

    Imputed patches go on from their surroundings. So they are nearer to images that the model knows than grey ones are,
    and their outline says less about what was removed.

    Source: Rong et al., A Consistent and Efficient Evaluation Strategy for Attribution Methods, ICML 2022
    (arXiv:2202.00449). There the unit is the pixel; here patches are removed, and imputed pixel by pixel.

    Args:
        model: images to logits [B, classes], in eval mode.
        images: normalised for the model, of its dtype and device.
        targets: None for the predicted class of the clean image, an int, or integers [B].
        relevance: one map an image, or those of M methods.
        shares: removed shares, each above 0 and below 1; as many patches are removed as that is nearest to.
        output: "probability" of the target, or "accuracy": 1 where no class is more probable than it, as in the paper.
        noise: standard deviation of the normal noise on imputed pixels, in units of the normalised image.
        probability: of the logits; "sigmoid" for a model whose classes do not exclude each other.
        grid: (rows, columns) of the patches; by default a square.
        batch_size: images in a forward pass, and images that are imputed at a time.
        seed: of the noise, which is one picture for each image, the same on all devices. With one seed for each image
            the noise does not depend on an image's place in the batch.

    Raises:
        TypeError, ValueError: an argument is wrong; its name comes first.
    """
    check_among("output", output, ("probability", "accuracy"))
    if not shares or not all(0 < share < 1 for share in shares):
        raise ValueError(f"shares: expected numbers above 0 and below 1, got {list(shares)}")
    if not 0 <= noise < float("inf"):
        raise ValueError(f"noise: expected a standard deviation of at least 0, got {noise}")
    trial = prepare(model, images, targets, relevance, grid, batch_size, probability)
    counts = [round(share * trial.maps.shape[2]) for share in shares]
    orders = torch.cat([places(trial.maps), places(-trial.maps)])  # [2 M, B, P]
    found = trial.respond(first(orders, counts), _imputed(trial, noise, seed))  # [K, 2 M, B]
    score = found.probability if output == "probability" else (found.probability >= found.largest).double()
    return Road(*(trial.shaped(part) for part in score.mean(0).chunk(2)))


def _imputed(trial: Trial, noise: float, seed: int | Sequence[int]) -> Fill:
    images = trial.images
    added = (noise * drawn_for(images, seed)(torch.randn)).to(images)

    def fill(owner: Tensor, removed: Tensor) -> Tensor:  # [b], [b, P]
        rows, columns = trial.grid
        tall, wide = trial.patch
        pixels = removed.view(-1, 1, rows, columns).repeat_interleave(tall, 2).repeat_interleave(wide, 3)
        return trial.tiles(impute(images[owner], pixels, trial.patch) + added[owner])

    return fill
