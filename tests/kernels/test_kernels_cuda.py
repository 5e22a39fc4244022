"""The Triton kernels on a CUDA device against the reference in float64 on the CPU. Has never run on one."""

from __future__ import annotations

import importlib
import os
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from fga_fast import SparseAutoencoder, reference
from fga_fast.settings import Activation

REQUIRED = os.environ.get("FGA_FAST_REQUIRE_CUDA") == "1"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available() and not REQUIRED, reason="no CUDA device"),
]

ACTIVATIONS = get_args(Activation)


@pytest.fixture
def kernels() -> Any:
    return importlib.import_module("fga_fast.kernels")


def sae_of(activation: str, width: int, features: int, normalize: str | None = None) -> SparseAutoencoder:
    gated = {name: 0.3 * torch.randn(features) for name in ("b_gate", "r_mag", "b_mag")}
    return SparseAutoencoder(
        torch.randn(width, features) / width**0.5, None if activation == "gated" else 0.1 * torch.randn(features),
        torch.randn(features, width) / width**0.5, 0.1 * torch.randn(width), activation,
        k=16 if activation.startswith("topk") else None,
        threshold=0.5 if activation in ("jumprelu", "batch_topk") else None, normalize=normalize,
        **(gated if activation == "gated" else {}),
    )  # fmt: skip


def error(got: Tensor, want: Tensor) -> float:
    return float((got.cpu().double() - want).norm() / want.norm())


@pytest.mark.parametrize("shape", ((1, 7, 32, 100), (3, 50, 64, 1000), (2, 196, 768, 4096)))
@pytest.mark.parametrize("normalize", (None, "layer_norm"))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_score(kernels: Any, activation: str, normalize: str | None, shape: tuple[int, int, int, int]) -> None:
    images, patches, width, features = shape
    sae = sae_of(activation, width, features, normalize)
    x, g = torch.randn(images, patches, width), torch.randn(2 * images, patches, width)
    image = torch.arange(images).repeat(2).flip(0)
    want = reference.score(x[image].double(), g.double(), sae.double(), "combined")
    got = kernels.score(x.cuda(), g.cuda(), sae.float().cuda(), image=image.cuda()).scores
    assert error(got, want) < 1e-4
    again = kernels.score(x.cuda(), g.cuda(), sae, image=image.cuda()).scores
    assert torch.equal(got, again)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_score_in_sixteen_bits(kernels: Any, activation: str, dtype: torch.dtype) -> None:
    """At most twice the error of the reference in that dtype."""
    sae = sae_of(activation, 768, 4096)
    x, g = torch.randn(4, 196, 768), torch.randn(4, 196, 768)
    want = reference.score(x.double(), g.double(), sae.double(), "combined")
    low = sae.to(device="cuda", dtype=dtype)
    x, g = x.to("cuda", dtype), g.to("cuda", dtype)
    plain = error(reference.score(x, g, low, "combined"), want)
    assert error(kernels.score(x, g, low).scores, want) <= 2 * plain


@pytest.mark.parametrize("rows", (1, 64))
@pytest.mark.parametrize("patches", (1, 2, 17, 196, 197, 1024, 4096))
def test_gate(kernels: Any, patches: int, rows: int) -> None:
    scores = torch.randn(rows, patches)
    got = kernels.gate(scores.cuda(), 10.0, 1.0)
    torch.testing.assert_close(got.cpu().double(), reference.gate(scores.double(), 10.0, 1.0), rtol=2e-5, atol=2e-5)
