"""The composite stages: the same explanations as the reference, on any device, in chunks."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from explaining import PIXELS, Build, sae_for
from torch import Tensor

from fga_fast import Explainer, Gate, composite, reference

attention_file = importlib.import_module("fga_fast.composite.attention")
score_file = importlib.import_module("fga_fast.composite.score")

TARGETS = torch.tensor([[0, 3, 2], [1, 1, 4]])

SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {},
    "conservative": {"backward": "conservative"},
    "signed": {"signed": True, "start_block": 1},
    "input x gradient": {"method": "input_x_gradient", "backward": "conservative"},
}


@pytest.fixture(params=("whole", "chunks"))
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small enough shapes fit one chunk; here also with chunks of a few rows, the last one shorter."""
    if request.param == "chunks":
        monkeypatch.setattr(attention_file, "_CHUNK", 2 * 2 * 7 * 3)  # three of seven query rows
        monkeypatch.setattr(score_file, "_CHUNK", 40 * 2 * 4)  # four of six patches, or two


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("pooling", ({}, {"global_pool": "map", "class_token": False}))
@pytest.mark.parametrize("setting", SETTINGS)
def test_explanations(tiny_vit: Build, setting: str, pooling: dict[str, Any]) -> None:
    model = tiny_vit(**pooling).double()
    saes = {1: sae_for(model), 2: sae_for(model, activation="topk", k=4, normalize="layer_norm")}
    images = torch.randn(2, *PIXELS, dtype=torch.float64)
    for targets in (TARGETS, TARGETS[:, 0]):
        got, want = (
            Explainer(
                model,
                saes,
                gate=Gate(base=3.0),
                backend=backend,
                top_features=3,
                **SETTINGS[setting],
                preset="published",
            )(images, targets)
            for backend in ("composite", "reference")
        )
        assert got.backend == "composite"
        torch.testing.assert_close(got.relevance, want.relevance, rtol=1e-8, atol=1e-11)
        for layer in saes:
            torch.testing.assert_close(got.scores[layer], want.scores[layer], rtol=1e-8, atol=1e-10)
            for mine, theirs in zip(got.features[layer], want.features[layer], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("mode", ("combined", "activation_only", "gradient_only", "no_sae", "shuffled"))
@pytest.mark.parametrize("top_features", (0, 3))
@pytest.mark.parametrize("activation", ("relu", "topk", "batch_topk", "jumprelu", "gated"))
def test_scores(random_sae: Any, activation: str, mode: str, top_features: int) -> None:
    if top_features and mode in ("gradient_only", "no_sae"):
        pytest.skip("these modes have no features to rank")
    sae = random_sae(activation)
    x, g = torch.randn(2, 6, 16).double(), torch.randn(2, 6, 16).double()
    permutation = torch.randperm(40) if mode == "shuffled" else None
    got = composite.score(x, g, sae, mode, permutation=permutation, top_features=top_features)
    torch.testing.assert_close(got.scores, reference.score(x, g, sae, mode, permutation=permutation))
    if top_features:
        want = reference.top_features(reference.contributions(x, g, sae, mode, permutation=permutation), top_features)
        for mine, theirs in zip(got[1:], want, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_dtypes(tiny_vit: Build, dtype: torch.dtype) -> None:
    """The rule for 16 bits: at most twice the error of the reference in that dtype."""
    model, images = tiny_vit(), torch.randn(4, *PIXELS)
    saes = {1: sae_for(model)}
    want = Explainer(model, saes, backend="reference", preset="published")(images, 1).relevance
    low, low_saes = model.to(dtype), {1: saes[1].to(dtype)}
    plain = Explainer(low, low_saes, backend="reference", preset="published")(images.to(dtype), 1).relevance
    got = Explainer(low, low_saes, backend="composite", preset="published")(images.to(dtype), 1).relevance
    assert got.dtype == torch.float32
    assert float((got - want).norm()) <= max(2 * float((plain - want).norm()), 1e-4 * float(want.norm()))


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("shape", ((2, 2, 7, 7), (1, 1, 7, 7), (2, 1, 1, 7), (7, 7)))
def test_bias(shape: tuple[int, ...]) -> None:
    """Against autograd through a softmax that is written out."""
    q, k, v = (torch.randn(2, 2, 7, 4).double().requires_grad_() for _ in range(3))
    bias, carrier = torch.randn(shape).double(), torch.zeros(2, 7).double().requires_grad_()
    grad, row, gate = torch.randn(2, 2, 7, 4).double(), torch.rand(2, 7).double(), torch.rand(2, 7).double()
    out, _, carried, port = composite.attention(q, k, v, carrier, scale=0.4, bias=bias, gated=True)
    got = torch.autograd.grad([out, carried, port], [q, k, v, carrier], [grad, row, gate])
    maps = (q @ k.mT * 0.4 + bias).softmax(-1)
    torch.testing.assert_close(out, maps @ v)
    *want, d_maps = torch.autograd.grad(maps @ v, [q, k, v, maps], grad)
    for mine, theirs in zip(got, want, strict=False):
        torch.testing.assert_close(mine, theirs)
    relevance = (maps * d_maps).clamp(min=0).mean(1)  # [B, N, N]
    torch.testing.assert_close(got[3], gate * (row.unsqueeze(1) @ relevance).squeeze(1))
    with pytest.raises(ValueError, match="bias has no gradient"):
        composite.attention(q, k, v, carrier, scale=0.4, bias=bias.requires_grad_())


def test_memory_is_bounded_by_chunks(tiny_vit: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """No softmax ever sees more rows than a chunk has."""
    sizes: list[int] = []
    original = Tensor.softmax
    monkeypatch.setattr(attention_file, "_CHUNK", 2 * 2 * 7 * 3)
    monkeypatch.setattr(Tensor, "softmax", lambda self, dim: (sizes.append(self.numel()), original(self, dim))[1])
    Explainer(tiny_vit(), backend="composite", preset="published")(torch.randn(2, *PIXELS))
    assert sizes and max(sizes) <= 2 * 2 * 7 * 3
