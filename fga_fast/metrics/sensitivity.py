"""Max-sensitivity: how much does a map change when the image hardly does?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fga_fast.metrics.checks import as_maps, check_images, check_number
from fga_fast.metrics.noise import drawn_for


def sensitivity(
    explain: Callable[[Tensor], Tensor],
    images: Tensor,  # [B, C, H, W]
    relevance: Tensor | None = None,  # [B, P] or [M, B, P]
    *,
    runs: int = 10,
    radius: float = 0.02,
    normalise: bool = True,
    seed: int | Sequence[int] = 0,
) -> Tensor:  # -> [B] or [M, B] float64
    """Largest change of an image's map under small noise, at least 0; lower is better.

    The change is the Euclidean distance of the two maps. Noise is uniform in [-radius, radius], drawn for each number
    of the image. The largest of `runs` draws is a lower bound of the maximum, and rises with `runs`.

    Source: Yeh et al., On the (In)fidelity and Sensitivity of Explanations, NeurIPS 2019 (arXiv:1901.09392),
    definition 2.

    Args:
        explain: images [B, C, H, W] to maps [B, P] or [M, B, P]. Let it explain the classes of the clean images, as in
            `lambda x: explainer(x, targets).relevance`; the noise may change the prediction.
        images: normalised for the model.
        relevance: the maps of `images`, if they are known.
        runs: noisy copies of each image.
        radius: in units of the normalised image.
        normalise: divide by the length of the clean map, so that methods of different scales compare; the paper's
            equation does not.
        seed: of the noise, which is the same on all devices. With one seed for each image the noise does not depend on
            an image's place in the batch.

    Returns:
        NaN where it is divided by the length of a map of zeros.

    Raises:
        TypeError, ValueError: an argument is wrong; its name comes first.
    """
    check_images(images)
    check_number("runs", runs, 1)
    if not 0 < radius < float("inf"):
        raise ValueError(f"radius: expected a number above 0, got {radius}")
    given = explain(images) if relevance is None else relevance
    clean = as_maps(given, len(images)).to(images.device)
    draw = drawn_for(images, seed)
    largest = torch.zeros(clean.shape[:2], dtype=torch.float64, device=images.device)
    for _ in range(runs):
        unit = draw(torch.rand) * 2 - 1
        noisy = as_maps(explain(images + (radius * unit).to(images)), len(images)).to(images.device)
        if noisy.shape != clean.shape:
            raise ValueError(
                f"explain: expected maps {list(clean.shape)} as for the clean images, got {list(noisy.shape)}"
            )
        largest = torch.maximum(largest, (noisy - clean).norm(dim=-1))
    if normalise:
        length = clean.norm(dim=-1)
        largest = torch.where(length > 0, largest / length.where(length > 0, 1), torch.nan)
    return largest[0] if given.dim() == 2 else largest
