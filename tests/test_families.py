"""timm's own model definitions, cut down to two narrow blocks with random weights, against the reference."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from fga_fast import Explainer, Gate, SparseAutoencoder

timm = pytest.importorskip("timm")

# name -> size of the images, expected pooling, prefix tokens
FAMILIES: dict[str, tuple[int, str, int]] = {
    "vit_tiny_patch16_224": (64, "token", 1),
    "vit_base_patch32_224": (96, "token", 1),
    "vit_base_patch16_rpn_224": (64, "average", 0),
    "vit_medium_patch16_gap_256": (64, "average", 0),
    "deit_tiny_patch16_224": (64, "token", 1),
    "deit3_small_patch16_224": (64, "token", 1),
    "vit_small_patch14_dinov2": (56, "token", 1),
    "vit_small_patch14_reg4_dinov2": (56, "token", 5),
    "vit_giant_patch14_reg4_dinov2": (56, "token", 5),
    "vit_base_patch16_clip_224": (64, "token", 1),
    "vit_base_patch16_clip_quickgelu_224": (64, "token", 1),
    "vit_base_patch16_siglip_224": (64, "attention", 0),
    "vit_base_patch16_siglip_gap_224": (64, "average", 0),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_timm_models(name: str) -> None:
    size, pooling, prefix = FAMILIES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = timm.create_model(name, img_size=size, depth=2, embed_dim=48, num_heads=3, num_classes=6)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    sae = SparseAutoencoder(torch.randn(48, 90), torch.randn(90), torch.randn(90, 48), torch.randn(48))
    images = torch.randn(2, 3, size, size)
    fast = Explainer(model, {0: sae, 1: sae}, Gate(base=4.0), backend="native")
    assert (fast.layout.pooling, fast.layout.prefix_tokens) == (pooling, prefix)
    got, want = fast(images), Explainer(model, {0: sae, 1: sae}, Gate(base=4.0), backend="reference")(images)
    assert float(want.relevance.norm()) > 0
    assert float((got.relevance - want.relevance).norm() / want.relevance.norm()) < 1e-4
    for layer in (0, 1):
        assert float((got.gates[layer] - want.gates[layer]).norm() / want.gates[layer].norm()) < 1e-4
