"""A small model with a head on any of what its blocks hand on, and its textbook explanation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from own_vit import CLASSES, GRID, IMAGES, TOKENS, WIDTH, own_vit
from torch import Tensor, nn

from fga_fast import Explainer
from fga_fast.models.block_io import TapeError
from fga_fast.models.layout import ModelLayout

BACKENDS: Any = ("native", "composite", "reference")
TARGET = 3
Streams = Sequence[Tensor]  # what blocks hand on, each [B, N, C]


class Headed(nn.Module):
    """Three blocks and a head on any of what they hand on."""

    def __init__(self, read: Callable[[Streams, nn.Module], Tensor], width: int = WIDTH) -> None:
        super().__init__()
        self.inner, self.read = own_vit(), read
        self.embed_dim = WIDTH
        torch.manual_seed(5)
        self.head = nn.Linear(width, CLASSES).double()

    def streams(self, images: Tensor) -> list[Tensor]:
        inner = self.inner
        x = inner.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([inner.token.expand(len(x), -1, -1), x], dim=1) + inner.position
        return [x := layer(x) for layer in inner.layers]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.read(self.streams(images), self.inner.norm))  # type: ignore[no-any-return]

    def layout(self, pooling: Any = "token") -> ModelLayout:
        return ModelLayout(tuple(self.inner.layers), 1, GRID, pooling)


def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(IMAGES).double()


def textbook(model: Headed, x: Tensor, rows: dict[int, Tensor]) -> Tensor:  # block -> [N]; -> [B, P]
    """sum_l row_l (I + Cbar_l) ... (I + Cbar_0), with maps that the model's own softmax makes."""
    maps: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, _mask: Tensor | None) -> Tensor:
        maps.append((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1))
        return maps[-1] @ v

    forms = [layer.attn.form for layer in model.inner.layers]  # type: ignore[union-attr]
    for layer in model.inner.layers:
        layer.attn.form = attend  # type: ignore[union-attr, assignment]
    y = model(x)[:, TARGET].sum()
    for layer, form in zip(model.inner.layers, forms, strict=True):
        layer.attn.form = form  # type: ignore[union-attr]
    differentiated = [a for a in maps if a.requires_grad]
    gradients = torch.autograd.grad(y, differentiated, allow_unused=True)
    found = torch.zeros(len(x), TOKENS).double()
    for last, row in rows.items():
        matrix = torch.eye(TOKENS).double()
        for a, g in zip(differentiated[: last + 1], gradients, strict=False):
            matrix = matrix if g is None else matrix + (a * g).clamp(min=0).mean(1) @ matrix
        found = found + row @ matrix
    return found[:, 1:]


CLS = F.one_hot(torch.tensor(0), TOKENS).double()
MEAN = (1 - CLS) / (TOKENS - 1)
FIRST_TWO = F.pad(torch.full((2,), 0.5).double(), (1, TOKENS - 3))
HEADS: dict[str, tuple[Callable[[Streams, nn.Module], Tensor], int, dict[int, Tensor]]] = {
    "class token of the last block": (lambda x, norm: norm(x[2])[:, 0], 1, {2: CLS}),
    "class token of an earlier block": (lambda x, norm: x[0][:, 0], 1, {0: CLS}),
    "patches of an earlier block": (lambda x, norm: x[1][:, 1:].mean(1), 1, {1: MEAN}),
    "normalised patches": (lambda x, norm: norm(x[1])[:, 1:].mean(1), 1, {1: MEAN}),
    "some patches": (lambda x, norm: x[2][:, 1:3].mean(1), 1, {2: FIRST_TWO}),
    "class token beside mean": (lambda x, norm: torch.cat([x[2][:, 0], x[2][:, 1:].mean(1)], 1), 2, {2: CLS + MEAN}),
    "sum of blocks": (lambda x, norm: (0.2 * x[0] + 0.5 * x[1])[:, 0], 1, {0: CLS * 2 / 7, 1: CLS * 5 / 7}),
    "probe on all blocks": (
        lambda x, norm: torch.cat([*(norm(t)[:, 0] for t in x), norm(x[2])[:, 1:].mean(1)], 1),
        4,
        {0: CLS, 1: CLS, 2: CLS + MEAN},
    ),
}


def refused(model: Headed, match: str, saes: Any = None, **settings: Any) -> None:
    found = set()
    for backend in BACKENDS:
        with pytest.raises(TapeError, match=match) as error:
            Explainer(model, saes, layout=model.layout(), backend=backend, **settings, preset="published")(
                images(), TARGET
            )
        found.add(str(error.value))
    assert len(found) == 1
