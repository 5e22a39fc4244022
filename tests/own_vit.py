"""A user's own small vision transformer, whose attention is written in any of the ways that attention is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fga_fast.models.layout import ModelLayout

WIDTH, HEADS, GRID, CLASSES = 16, 4, (2, 3), 5
TOKENS = 1 + GRID[0] * GRID[1]
IMAGES = (2, 3, 16, 24)

# q, k, v [B, H, N, D], additive mask or None -> [B, H, N, D]
Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


def logits(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    found = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return found if mask is None else found + mask


def three_dimensional(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Images and heads in one dimension, as older models have it."""
    q3, k3, v3 = (t.flatten(0, 1) for t in (q, k, v))
    mask = None if mask is None else mask.expand(*q.shape[:2], *mask.shape[-2:]).flatten(0, 1)
    return (logits(q3, k3, mask).softmax(-1) @ v3).view_as(q)


def upcast(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.softmax(logits(q, k, mask), dim=-1, dtype=torch.float32).to(q.dtype) @ v


FORMS: dict[str, Attend] = {
    "sdpa": lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
    "F.softmax": lambda q, k, v, mask: F.softmax(logits(q, k, mask), dim=-1) @ v,
    "torch.softmax": lambda q, k, v, mask: torch.softmax(logits(q, k, mask), 3) @ v,
    "Tensor.softmax": lambda q, k, v, mask: F.dropout(logits(q, k, mask).softmax(dim=-1), 0.0, False) @ v,
    "three dimensions": three_dimensional,
    "upcast": upcast,
}


class Attention(nn.Module):
    """`form` is a key of FORMS, "mha" for a call of nn.MultiheadAttention, or a function."""

    def __init__(self, form: str | Attend, mask: Tensor | None) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.form, self.mask = form, mask

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:  # [B, Nq, C], [B, N, C]
        if self.form == "mha":
            out: Tensor = self.mha(query, tokens, tokens, need_weights=False, attn_mask=self.mask)[0]
            return out
        attend = FORMS[self.form] if isinstance(self.form, str) else self.form
        weights, biases = self.mha.in_proj_weight.chunk(3), self.mha.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for x, weight, bias in zip((query, tokens, tokens), weights, biases, strict=True)
        )
        mask = None if self.mask is None else self.mask.to(q.dtype)
        return self.mha.out_proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, form: str | Attend, mask: Tensor | None, returns: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = Attention(form, mask)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.returns = returns

    def forward(self, hidden_states: Tensor) -> Any:
        x = hidden_states.transpose(0, 1) if self.returns == "tokens first" else hidden_states
        normed = self.norm1(x)
        x = x + self.attn(normed, normed)
        x = x + self.mlp(self.norm2(x))
        if self.returns == "tokens first":
            return x.transpose(0, 1)
        return (x, None) if self.returns == "tuple" else x


def _by_keyword(block: nn.Module, x: Tensor, _positions: Tensor) -> Any:
    return block(hidden_states=x)


def _by_position(block: nn.Module, x: Tensor, _positions: Tensor) -> Any:
    return block(x)


class OwnViT(nn.Module):
    """Three blocks and a class token; `returns`: what blocks hand over, "tensor", "tuple" or "tokens first"."""

    def __init__(
        self,
        form: str | Attend = "sdpa",
        *,
        mask: Tensor | None = None,  # broadcastable to [H, N, N]
        returns: str = "tensor",
        pool: str | Attend | None = None,  # attention pool of this form
        by_keyword: bool = False,
        adds_in_place: bool = False,
        call: Callable[[nn.Module, Tensor, Tensor], Any] | None = None,  # how a block gets tokens and positions
    ) -> None:
        super().__init__()
        self.embed_dim = WIDTH
        self.patches = nn.Conv2d(3, WIDTH, 8, stride=8)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.position = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.layers = nn.ModuleList(Block(form, mask, returns) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)
        self.query = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pool = Attention("sdpa" if pool is None else pool, None)
        self.pools, self.returns = pool is not None, returns
        self.adds_in_place = adds_in_place
        self.call = call or (_by_keyword if by_keyword else _by_position)

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, 16, 24] -> [B, 5]
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        x = x.transpose(0, 1) if self.returns == "tokens first" else x
        for layer in self.layers:
            out = self.call(layer, x, self.position.expand(len(images), -1, -1))
            x = out[0] if isinstance(out, tuple) else out
            if self.adds_in_place:
                x += 1
        x = self.norm(x.transpose(0, 1) if self.returns == "tokens first" else x)
        pooled = self.pool(self.query.expand(len(x), -1, -1), x)[:, 0] if self.pools else x[:, 0]
        return self.head(pooled)  # type: ignore[no-any-return]

    def layout(self) -> ModelLayout:
        return ModelLayout(
            blocks=tuple(self.layers),
            prefix_tokens=1,
            grid=GRID,
            pooling="attention" if self.pools else "token",
            pooled=(0, TOKENS) if self.pools else None,  # type: ignore[arg-type]
            tokens_first=self.returns == "tokens first",
        )


def own_vit(form: str | Attend = "sdpa", **settings: Any) -> OwnViT:
    """In float64, with weights that make attention uneven; the same weights every time."""
    torch.manual_seed(3)
    model = OwnViT(form, **settings).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model
