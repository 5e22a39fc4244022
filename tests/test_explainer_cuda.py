"""Whole explanations on a CUDA device: every backend against the reference in float64 on the CPU."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from explaining import PIXELS, Build, sae_for

from fga_fast import Explainer, Gate

if os.environ.get("FGA_FAST_REQUIRE_CUDA") != "1":
    pytestmark = [
        pytest.mark.cuda,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ]

BACKENDS = ("native", "triton", "composite", "reference")
SAES: dict[str, dict[str, Any]] = {
    "relu": {},
    "topk": {"activation": "topk", "k": 4, "normalize": "layer_norm"},
    "jumprelu": {"activation": "jumprelu", "threshold": 0.5},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "class token": {},
    "conservative": {"backward": "conservative"},
    "input x gradient": {"method": "input_x_gradient", "backward": "conservative"},
    "default": {"method": "block_x_gradient", "backward": "conservative"},
    "signed, late": {"signed": True, "start_block": 1},
}


def test_auto_says_what_runs(tiny_vit: Build) -> None:
    e = Explainer(tiny_vit().cuda(), preset="published")(torch.randn(1, *PIXELS, device="cuda"))
    assert (e.backend, bool(e.backend_reason)) in (("native", False), ("composite", True)) and e.relevance.is_cuda


@pytest.mark.parametrize("targets", (1, [[0, 3, 2], [1, 1, 4]]), ids=("one target", "three targets"))
@pytest.mark.parametrize("sae", SAES)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32(tiny_vit: Build, backend: Any, setting: str, sae: str, targets: Any) -> None:
    # Head widths of 32 and more, as kernels take them.
    model = tiny_vit(embed_dim=64, num_heads=2, global_pool="avg" if setting == "signed, late" else "token")
    saes, images = {1: sae_for(model, **SAES[sae])}, torch.randn(2, *PIXELS)
    got = Explainer(
        model.cuda(), {1: saes[1].cuda()}, gate=Gate(base=3.0), backend=backend, **SETTINGS[setting], preset="published"
    )(images.cuda(), targets)
    wide = {1: saes[1].cpu().double()}
    want = Explainer(
        model.cpu().double(), wide, gate=Gate(base=3.0), backend="reference", **SETTINGS[setting], preset="published"
    )(images.double(), targets)
    assert got.relevance.is_cuda and got.relevance.dtype == torch.float32
    assert float((got.relevance.cpu() - want.relevance).norm() / want.relevance.norm()) < 1e-4


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("backend", ("native", "triton", "composite"))
def test_sixteen_bits(tiny_vit: Build, backend: Any, dtype: torch.dtype) -> None:
    """At most twice the error of the reference run in that dtype on the same device."""
    model = tiny_vit(embed_dim=64, num_heads=2)
    sae, images = sae_for(model), torch.randn(4, *PIXELS)
    want = Explainer(model.double(), {1: sae.double()}, backend="reference", preset="published")(
        images.double(), 1
    ).relevance
    low, low_sae, low_images = model.to("cuda", dtype), sae.to(device="cuda", dtype=dtype), images.to("cuda", dtype)
    plain = Explainer(low, {1: low_sae}, backend="reference", preset="published")(low_images, 1).relevance.cpu()
    got = Explainer(low, {1: low_sae}, backend=backend, preset="published")(low_images, 1).relevance.cpu()
    assert float((got - want).norm()) <= 2 * float((plain - want).norm())


@pytest.mark.parametrize("backend", ("native", "triton"))
def test_the_same_bits_every_run(tiny_vit: Build, backend: Any) -> None:
    model = tiny_vit(embed_dim=64, num_heads=2).cuda()
    explainer = Explainer(model, {1: sae_for(model)}, backend=backend, top_features=3, preset="published")
    images = torch.randn(2, *PIXELS, device="cuda")
    first, second = explainer(images, [[0, 1], [2, 3]]), explainer(images, [[0, 1], [2, 3]])
    assert torch.equal(first.scores[1], second.scores[1]) and torch.equal(first.gates[1], second.gates[1])


def test_autocast(tiny_vit: Build) -> None:
    model = tiny_vit(embed_dim=64, num_heads=2).cuda()
    images = torch.randn(2, *PIXELS, device="cuda")
    want = Explainer(model, preset="published")(images, 1).relevance
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cuda", dtype=dtype):
            got = Explainer(model, preset="published")(images, 1).relevance
        assert got.dtype == torch.float32
        assert float((got - want).norm() / want.norm()) < 0.2
