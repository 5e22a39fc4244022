"""Blocks that are lists of modules, with the residual additions outside of them, as in vit-pytorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from explaining import agree, sae_for, where_installed
from own_vit import GRID, IMAGES, own_vit
from pair_vit import PairViT, Step, by_function, by_names, in_place, plainly
from torch import Tensor, nn

from fga_fast import Explainer, ModelLayout

SETTINGS: tuple[dict[str, Any], ...] = (
    {"per_block": True, "gated": True},
    {"start_block": 1, "gated": True, "backward": "conservative"},
    {"method": "input_x_gradient", "per_block": True, "gated": True},
    {"method": "input_x_gradient", "backward": "conservative", "start_block": 1},
)


@pytest.mark.parametrize("backend", ("native", "reference"))
@pytest.mark.parametrize("step", (plainly, in_place, by_function, by_names))
def test_as_with_blocks_that_are_modules(step: Step, backend: Any) -> None:
    own, images = own_vit(), torch.randn(IMAGES).double()
    pairs = PairViT(own, step).eval()
    torch.testing.assert_close(pairs(images), own(images))
    for settings in SETTINGS:
        given = {name: value for name, value in settings.items() if name != "gated"}
        saes = {1: sae_for(own), 2: sae_for(own)} if settings.get("gated") else {}
        got, want = (
            Explainer(model, saes, layout=model.layout(), backend=backend, **given, preset="published")(
                images, [[1, 2]]
            )
            for model in (pairs, own)
        )
        agree(got, want, 1e-12)


def scaled(parts: Any, x: Tensor) -> Tensor:
    attn, mlp = parts
    x = attn(x) + x
    return x + 0.5 * mlp(x)


def test_what_is_not_added_at_once_is_refused() -> None:
    model = PairViT(own_vit(), scaled).eval()
    text = r"block 0 \(ModuleList\) is a list .* must be added to the residual stream"
    for _ in range(2):  # three blocks, and one only
        with pytest.raises(ValueError, match=text):
            Explainer(model, layout=model.layout(), preset="published")(torch.randn(IMAGES).double())
        model.layers = model.layers[:1]  # type: ignore[assignment]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match=r"blocks\[0\]: expected modules in the ModuleList, got none"):
        ModelLayout([nn.ModuleList()], prefix_tokens=1, grid=GRID)  # type: ignore[arg-type]


def test_blocks_that_are_never_called() -> None:
    """A Sequential whose parts the model calls one by one, which a layout names as a block."""
    model = PairViT(own_vit(), plainly).eval()
    model.layers = nn.ModuleList(nn.Sequential(*pair) for pair in model.layers)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"0 of 3 blocks ran, block 0 \(Sequential\) did not; give modules that the m"):
        Explainer(model, layout=model.layout(), preset="published")(torch.randn(IMAGES).double())


@pytest.mark.parametrize("variant", ("vit.ViT", "simple_vit.SimpleViT", "simple_vit_with_qk_norm.SimpleViT"))
def test_vit_pytorch(variant: str) -> None:
    file, name = variant.split(".")
    library = where_installed(f"vit_pytorch.{file}")
    size = {"image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 16, "depth": 2, "heads": 2, "mlp_dim": 32}
    model = getattr(library, name)(**size).double().eval()
    token = name == "ViT"
    layout = ModelLayout(model.transformer.layers, int(token), (4, 4), "token" if token else "average")
    images, model.embed_dim = torch.randn(2, 3, 16, 16).double(), 16
    sae = sae_for(model)
    for settings in ({}, {"method": "input_x_gradient"}):
        got, want = (
            Explainer(model, {0: sae}, layout=layout, backend=backend, **settings, preset="published")(images)
            for backend in ("native", "reference")
        )
        agree(got, want, 1e-10)
