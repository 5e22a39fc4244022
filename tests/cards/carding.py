"""What the tests of feature cards share: SAEs that fit the small model of the harvests."""

from __future__ import annotations

from typing import Any

import torch
from own_vit import WIDTH

from fga_fast import SparseAutoencoder

FEATURES = 24


def sae(seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> SparseAutoencoder:
    """Its feature 5 is never active, and its features 8 and 9 are the same."""
    generator = torch.Generator().manual_seed(seed)
    W_enc = torch.randn(WIDTH, FEATURES, generator=generator) / 4
    b_enc = torch.randn(FEATURES, generator=generator) / 2 + 0.3
    W_enc[:, 5], b_enc[5] = 0, -1
    W_enc[:, 9], b_enc[9] = W_enc[:, 8], b_enc[8]
    parts = W_enc, b_enc, torch.randn(FEATURES, WIDTH, generator=generator), torch.randn(WIDTH, generator=generator) / 9
    return SparseAutoencoder(*(part.to(dtype) for part in parts), **settings)
