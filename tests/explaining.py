"""What the tests of whole explanations share: the size of `tiny_vit`'s images, and an SAE that fits a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fga_fast import SparseAutoencoder

Build = Callable[..., nn.Module]
PIXELS = (3, 32, 48)


def sae_for(model: nn.Module, features: int = 40, **settings: Any) -> SparseAutoencoder:
    width = int(model.embed_dim)  # type: ignore[arg-type]
    parameter = next(model.parameters())

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(parameter.dtype)

    return SparseAutoencoder(
        random(width, features), random(features), random(features, width), random(width), **settings
    )
