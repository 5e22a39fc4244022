"""What the tests of packages share: a small model with two SAEs, its images, and what goes with them."""

from __future__ import annotations

from typing import Any

import torch
from own_vit import IMAGES, WIDTH, own_vit
from torch import Tensor

from fga_fast import Explainer, SparseAutoencoder
from fga_fast.io.images import Preprocess

NAMES = ["ant", "bee", "cat", "dog", "émeu"]
PREPROCESS = Preprocess((16, 24), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), crop_pct=0.875, interpolation="bilinear")

EVERYTHING: dict[str, Any] = {
    "preset": "published", "top_features": 4, "per_block": True, "signed": True, "class_names": NAMES,
}  # fmt: skip


def images(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, *IMAGES[1:], generator=torch.Generator().manual_seed(count), dtype=torch.float64).to(
        dtype
    )


def sae(seed: int) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return SparseAutoencoder(draw(WIDTH, 40), draw(40), draw(40, WIDTH), draw(WIDTH))


def explainer(dtype: torch.dtype = torch.float64, device: str = "cpu", **settings: Any) -> Explainer:
    model = own_vit().to(device, dtype)
    saes = {layer: sae(layer).to(device, dtype) for layer in (0, 1)}
    return Explainer(model, **{"saes": saes, "layout": model.layout(), **settings})
