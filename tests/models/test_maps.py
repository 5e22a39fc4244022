"""Attention that a model writes out: the map that multiplies the values is the one that is explained, or it is refused.

`test_factors` is the proof of what is accepted: textbook TransMM on the changed maps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from own_vit import HEADS, IMAGES, TOKENS, Attend, logits, own_vit
from torch import Tensor

from fga_fast import Explainer

Change = Callable[[Tensor, Tensor], Tensor]  # maps and their logits [B, H, N, N] -> maps
SQUARE = torch.linspace(0.1, 0.9, TOKENS**2, dtype=torch.float64).view(TOKENS, TOKENS)
MIX = torch.linspace(-1, 1, HEADS**2, dtype=torch.float64).view(HEADS, HEADS)


def attention(change: Change, seen: list[Tensor] | None = None) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, _mask: Tensor | None) -> Tensor:
        before = logits(q, k, None)
        maps = change(before.softmax(-1), before)
        if seen is not None:
            seen.append(maps)
        return maps @ v

    return attend


def strongest(maps: Tensor, _logits: Tensor) -> Tensor:
    return torch.zeros_like(maps).scatter(-1, maps.topk(3).indices, maps.topk(3).values)


FACTORS: dict[str, Change] = {
    "mask": lambda a, _: a * (SQUARE > 0.5) / 0.5,
    "gate from the logits": lambda a, z: a * z.sigmoid(),
    "softmax off by one": lambda a, z: a * z.logsumexp(-1, keepdim=True).sigmoid(),
    "masked": lambda a, _: a.masked_fill(SQUARE < 0.3, 0.0),
    "the strongest": strongest,
    "above a threshold": lambda a, _: torch.where(a >= a.topk(3).values[..., -1:], a, 0.0),
}


@pytest.mark.parametrize("backend", ("native", "reference"))
@pytest.mark.parametrize("change", FACTORS)
def test_factors(change: str, backend: Any) -> None:
    """Factors that do not depend on the map: relevance is that of the map that multiplies the values."""
    seen: list[Tensor] = []
    model, images = own_vit(attention(FACTORS[change], seen)), torch.randn(IMAGES).double()
    value = model(images)[:, 2].sum()
    rows = torch.eye(TOKENS, dtype=torch.float64)[0].expand(len(images), -1)  # the class token's
    for maps in reversed(seen):
        (g,) = torch.autograd.grad(value, maps, retain_graph=True)
        rows = rows + (rows[:, None] @ (maps * g).clamp(min=0).mean(1))[:, 0]
    got = Explainer(model, layout=model.layout(), backend=backend, preset="published")(images, 2).relevance
    torch.testing.assert_close(got, rows[:, 1:].detach())


def halves(a: Tensor, _: Tensor) -> Tensor:
    return torch.cat([a[:, :2] - 0.3 * a[:, 2:]] * 2, dim=1)


CHANGES: dict[str, tuple[Change, str]] = {
    "heads mixed by einsum": (lambda a, _: torch.einsum("bhij,hg->bgij", a, MIX), "mixes its heads"),
    "heads mixed by a convolution": (lambda a, _: F.conv2d(a, MIX[..., None, None]), "'Convolution'"),
    "heads mixed by a linear layer": (lambda a, _: F.linear(a.movedim(1, 3), MIX).movedim(3, 1), "mixes its heads"),
    "heads mixed by a product": (lambda a, _: (MIX @ a.flatten(2)).view_as(a), "mixes its heads"),
    "normalised again": (lambda a, _: a / (1e-9 + a.sum(-1, keepdim=True)), "'Sum'"),
    "masked and normalised": (lambda a, _: F.normalize(a * SQUARE, p=1, dim=-1), "'LinalgVectorNorm'"),
    "added to": (lambda a, _: a + SQUARE, "'Add'"),
    "difference of heads": (halves, "'Sub'"),
    "transposed": (lambda a, _: a.mT, "mixes its heads or queries"),
    "keys mixed": (lambda a, _: a @ SQUARE, "fixed matrix"),
    "squared": (lambda a, _: a * a, "together with another form of itself"),
    "twice": (lambda a, _: a @ a, "mixes its heads or queries"),
    "in a denominator": (lambda a, z: z / a, "divided by it"),
}


@pytest.mark.parametrize("backend", ("native", "reference"))
@pytest.mark.parametrize("change", CHANGES)
def test_changed_maps(change: str, backend: Any) -> None:
    """Refused for the rollout, which needs the map; input x gradient is exact with any attention."""
    function, message = CHANGES[change]
    model, images = own_vit(attention(function)), torch.randn(IMAGES).double()
    explainer = Explainer(model, layout=model.layout(), backend=backend, preset="published")
    text = rf"block \d \(Block\) changes its attention map .*{message}.*input_x_grad"
    for _ in range(2):  # a refused model is not taken at the second try either
        with pytest.raises(ValueError, match=text):
            explainer(images, [[1, 2], [0, 3]])
    Explainer(model, layout=model.layout(), backend=backend, method="input_x_gradient", preset="published")(images)


def test_compiled_explanations_refuse_them_too() -> None:
    model = own_vit(attention(CHANGES["added to"][0]))
    with pytest.raises(ValueError, match="changes its attention map"):
        Explainer(model, layout=model.layout(), preset="published").module(torch.randn(IMAGES).double())


@pytest.mark.parametrize("backend", ("native", "reference"))
def test_heads_in_front_of_images(backend: Any) -> None:
    """[H B, N, N] instead of [B H, N, N]: its maps would be taken for those of other images."""

    def attend(q: Tensor, k: Tensor, v: Tensor, _mask: Tensor | None) -> Tensor:
        turned = [t.transpose(0, 1).flatten(0, 1) for t in (q, k, v)]
        out = logits(turned[0], turned[1], None).softmax(-1) @ turned[2]
        return out.unflatten(0, (HEADS, -1)).transpose(0, 1)

    model, images = own_vit(attend), torch.randn(IMAGES).double()
    with pytest.raises(ValueError, match=r"reads an attention map that was taken for another image's.*\[B H, N, N\]"):
        Explainer(model, layout=model.layout(), backend=backend, preset="published")(images, 1)


def test_maps_beside_the_way_to_the_logits_do_not_count() -> None:
    """A model that keeps its maps' entropy for a log changes nothing."""
    kept: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, _mask: Tensor | None) -> Tensor:
        maps = logits(q, k, None).softmax(-1)
        kept.append(-(maps * maps.log()).sum(-1))
        return maps @ v

    images = torch.randn(IMAGES).double()
    model, plain = own_vit(attend), own_vit("F.softmax")
    got, want = (Explainer(m, layout=m.layout(), preset="published")(images, 1).relevance for m in (model, plain))
    torch.testing.assert_close(got, want)
    assert len(kept) == 3
