"""A small vision transformer whose blocks are lists of modules, as in vit-pytorch: the model adds what they return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from own_vit import GRID, OwnViT
from torch import Tensor, nn

from fga_fast.models.layout import ModelLayout


class Attending(nn.Module):
    """Norm and attention of an `OwnViT`'s block; without the residual path."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm, self.attn = block.norm1, block.attn

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return self.attn(normed, normed)  # type: ignore[no-any-return]


Step = Callable[[Any, Tensor], Tensor]  # modules of a block, and the stream


def plainly(parts: Any, x: Tensor) -> Tensor:
    attn, mlp = parts
    x = attn(x) + x
    return mlp(x) + x


def in_place(parts: Any, x: Tensor) -> Tensor:
    attn, mlp = parts
    x = x + attn(x)
    out = mlp(x)
    out += x
    return out  # type: ignore[no-any-return]


def by_function(parts: Any, x: Tensor) -> Tensor:
    attn, mlp = parts
    x = torch.stack([x, attn(x)]).sum(0)
    return torch.add(input=x, other=mlp(x))


def by_names(parts: Any, x: Tensor) -> Tensor:
    x = parts["attn"](x) + x
    return parts["mlp"](x) + x


class PairViT(nn.Module):
    """The same function as an `OwnViT`, with the same weights."""

    def __init__(self, inner: OwnViT, step: Step) -> None:
        super().__init__()
        self.inner, self.step = inner, step
        self.layers = nn.ModuleList()
        for block in inner.layers:
            attn, mlp = Attending(block), nn.Sequential(block.norm2, block.mlp)  # type: ignore[arg-type]
            pair = nn.ModuleDict({"attn": attn, "mlp": mlp}) if step is by_names else nn.ModuleList([attn, mlp])
            self.layers.append(pair)

    def forward(self, images: Tensor) -> Tensor:
        inner = self.inner
        x = inner.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([inner.token.expand(len(x), -1, -1), x], dim=1) + inner.position
        for parts in self.layers:
            x = self.step(parts, x)
        return inner.head(inner.norm(x)[:, 0])  # type: ignore[no-any-return]

    def layout(self) -> ModelLayout:
        return ModelLayout(self.layers, prefix_tokens=1, grid=GRID)  # type: ignore[arg-type]
