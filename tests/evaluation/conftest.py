"""What the tests of methods share: subjects, images and targets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from explaining import PIXELS, Build, sae_for
from subjects import MODELS, Images

from fga_fast.evaluation.subject import Subject


@pytest.fixture
def images() -> Images:
    """Three images and their targets, two of them the same class."""
    return torch.randn(3, *PIXELS, dtype=torch.float64), torch.tensor([1, 4, 1])


@pytest.fixture
def make_subject(tiny_vit: Build) -> Callable[..., Subject]:
    """Builds a subject of 4 blocks in float64 with SAEs after blocks 0 and 1.

    Not after block 2, where a class token's head reads patches only through a LayerNorm: x . g is 0 but for rounding.
    """

    def make(kind: str = "class token", seed: int = 0) -> Subject:
        model = tiny_vit(depth=4, **MODELS[kind]).double()
        return Subject(model, {0: sae_for(model, normalize="layer_norm"), 1: sae_for(model)}, seed=seed)

    return make
