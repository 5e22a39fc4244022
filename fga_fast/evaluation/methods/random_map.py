"""Random relevance: what any method must beat."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from fga_fast.evaluation.subject import Subject
from fga_fast.precision import relevance_dtype


def random_map(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:
    """`r_p ~ N(0, 1)`, independent for each image, target and patch. The same seed, image and target give the same map.

    Args:
        images: [B, channels, H, W].
        targets: [B].

    Returns:
        [B, P].
    """
    patches = subject.explainer().plan.check(images).patches
    return draw("random", subject.seed, images, targets, patches).to(relevance_dtype(images.dtype))


def draw(
    name: str,
    seed: int,
    images: Tensor,  # [B, channels, H, W]
    targets: Tensor,  # [B]
    count: int,
) -> Tensor:  # [B, count] float64
    """Normal numbers for each image. They depend on the values of the image, and so not on its place in a batch.

    Args:
        name: of the method, so that methods draw apart from each other.
    """
    rows = []
    for image, target in zip(images.detach().cpu(), targets.tolist(), strict=True):
        told = hashlib.blake2b(f"{name} {seed} {target} ".encode(), digest_size=8)
        told.update(image.contiguous().view(torch.uint8).numpy().tobytes())
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(told.digest(), "big") >> 1)
        rows.append(torch.randn(count, generator=generator, dtype=torch.float64, device="cpu"))
    return torch.stack(rows).to(images.device) if rows else images.new_zeros(0, count, dtype=torch.float64)
