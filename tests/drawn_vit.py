"""A small vision transformer with a switch for everything that vision transformers differ in.

Each of its non-linear parts can also write itself out (`Book`), which is what the textbook explanation reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from own_vit import FORMS
from torch import Tensor, nn

from fga_fast.models.layout import ModelLayout
from fga_fast.settings import Pooling

Placement = Literal["before", "after", "after the branch", "around the branch", "before and after", "parallel"]
What = Literal["token", "patches", "all", "first two"]


@dataclass(frozen=True)
class Read:
    """What the head reads after `depth` blocks, with its weight in the sum of all reads."""

    depth: int
    what: What = "token"
    weight: float = 1.0


@dataclass(frozen=True)
class Shape:
    """What a `DrawnViT` is like; its repr builds it again."""

    depth: int = 1
    heads: int = 1
    head_width: int = 8
    prefix: int = 1
    grid: tuple[int, int] = (1, 2)
    classes: int = 2
    channels: int = 1
    reads: tuple[Read, ...] = (Read(1),)
    token: int = 0  # which one "token" reads
    pool: Literal["", "all", "patches"] = ""  # an attention pool over these, in place of `reads`
    form: str = "sdpa"  # of attention: a key of `own_vit.FORMS`, or "mha"
    bias: bool = True  # of q, k and v
    mask: bool = False  # an additive one
    qk_norm: bool = False
    norm: Literal["layer", "rms"] = "layer"
    placement: Placement = "before"
    final_norm: Literal["", "tokens", "vector"] = "tokens"
    layer_scale: bool = False
    mlp: Literal["gelu", "silu", "relu", "swiglu", "geglu"] = "gelu"
    dropout: bool = False  # modules that do nothing in eval mode
    tokens_first: bool = False
    returns_tuple: bool = False
    in_place: bool = False
    frozen: bool = False  # no parameter requires a gradient
    logit_scale: float = 1.0
    seed: int = 0

    @property
    def width(self) -> int:
        return self.heads * self.head_width

    @property
    def tokens(self) -> int:
        return self.prefix + self.grid[0] * self.grid[1]

    def span(self, what: str) -> tuple[int, int]:
        """The tokens [start, stop) that a kind of reading takes."""
        spans = {"token": (self.token, self.token + 1), "patches": (self.prefix, self.tokens), "first two": (0, 2)}
        return spans.get(what, (0, self.tokens))


@dataclass
class Book:
    """What a model writes down while it computes in the textbook's words."""

    conservative: bool
    maps: list[Tensor] = field(default_factory=list)  # A [B, H, N, N] of each block; [B, H, 1, tokens] of the pool
    values: list[Tensor] = field(default_factory=list)  # V [B, H, N, D] likewise
    attended: list[Tensor] = field(default_factory=list)  # O = A V
    inputs: list[Tensor] = field(default_factory=list)  # what enters each block, [B, N, C] or [N, B, C]
    outputs: list[Tensor] = field(default_factory=list)  # what leaves it

    def factor(self, value: Tensor) -> Tensor:
        """A factor that the conservative backward pass holds constant."""
        return value.detach() if self.conservative else value


class Part(nn.Module):
    """A module that writes itself out where there is a book."""

    book: Book | None = None


class Norm(Part):
    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:  # [..., C]
        if self.book is None and self.bias is None:
            return F.rms_norm(x, x.shape[-1:], self.weight, 1e-6)
        if self.book is None:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, 1e-6)
        centred = x if self.bias is None else x - x.mean(-1, keepdim=True)
        y = centred * self.book.factor((centred.square().mean(-1, keepdim=True) + 1e-6).rsqrt()) * self.weight
        return y if self.bias is None else y + self.bias


class Mlp(Part):
    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.gated = kind in ("swiglu", "geglu")
        self.act = {"swiglu": F.silu, "silu": F.silu, "relu": F.relu}.get(kind, F.gelu)
        hidden = width + 3
        self.up, self.down = nn.Linear(width, hidden * (1 + self.gated)), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:  # [..., C]
        a = self.up(x)
        if self.gated:
            a, b = a.chunk(2, -1)
            return self.down((self.act(a) if self.book is None else self.book.factor(self.act(a))) * b)
        return self.down(self.act(a) if self.book is None else a * self.book.factor(self.act(a) / a))


class Attention(Part):
    def __init__(self, shape: Shape, queries: int) -> None:
        super().__init__()
        self.tokens_first, self.form, self.heads = shape.tokens_first, shape.form, shape.heads
        dropout = 0.5 if shape.dropout else 0.0
        self.mha = nn.MultiheadAttention(
            shape.width, shape.heads, dropout, shape.bias, batch_first=not self.tokens_first
        )
        normed = shape.qk_norm and shape.form != "mha"
        self.q_norm, self.k_norm = (Norm(shape.head_width, shape.norm) if normed else nn.Identity() for _ in range(2))
        mask = torch.randn(queries, shape.tokens) if shape.mask and queries > 1 else None
        self.register_buffer("mask", mask)

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:  # [B, Nq, C], [B, N, C], or both tokens first
        if self.form == "mha" and self.book is None:
            return self.mha(query, tokens, tokens, need_weights=False, attn_mask=self.mask)[0]
        order = (1, 2, 0, 3) if self.tokens_first else (0, 2, 1, 3)
        biases = (None,) * 3 if self.mha.in_proj_bias is None else self.mha.in_proj_bias.chunk(3)
        projected = zip((query, tokens, tokens), self.mha.in_proj_weight.chunk(3), biases, strict=True)
        q, k, v = (F.linear(x, w, b).unflatten(-1, (self.heads, -1)).permute(order) for x, w, b in projected)
        q, k = self.q_norm(q), self.k_norm(k)  # [B, H, N, D]
        out = FORMS[self.form](q, k, v, self.mask) if self.book is None else self._written_out(q, k, v)
        return self.mha.out_proj(out.permute(*((2, 0, 1, 3) if self.tokens_first else order)).flatten(2))

    def _written_out(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self.book is not None
        logits = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        maps = self.book.factor((logits if self.mask is None else logits + self.mask).softmax(-1))
        out = maps.requires_grad_() @ v if self.book.conservative else maps @ v
        self.book.maps.append(maps)
        self.book.values.append(v)
        self.book.attended.append(out)
        return out


class Block(Part):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.attn, self.mlp = Attention(shape, shape.tokens), Mlp(shape.width, shape.mlp)
        self.norms = nn.ModuleList(Norm(shape.width, shape.norm) for _ in range(4))
        self.scales = nn.ParameterList(torch.randn(shape.width) for _ in range(2 * shape.layer_scale))
        self.dropout = nn.Dropout(0.5) if shape.dropout else nn.Identity()

    def branch(self, index: int, x: Tensor) -> Tensor:
        y = self.dropout(self.mlp(x) if index else self.attn(x, x))
        return self.scales[index] * y if self.shape.layer_scale else y

    def step(self, index: int, x: Tensor) -> Tensor:
        """One of the two residual branches around x, normed where this model norms."""
        first, second = self.norms[2 * index], self.norms[2 * index + 1]
        placement = self.shape.placement
        y = self.branch(index, x if placement in ("after", "after the branch") else first(x))
        y = second(y) if placement in ("after the branch", "around the branch") else y
        if self.shape.in_place:
            y += x
        else:
            y = x + y
        return second(y) if placement in ("after", "before and after") else y

    def forward(self, x: Tensor) -> Any:  # [B, N, C], or tokens first
        if self.book is not None:
            x = x.clone()  # what the head reads of it enters no block
            self.book.inputs.append(x)
        if self.shape.placement == "parallel":
            x = x + self.branch(0, self.norms[0](x)) + self.branch(1, self.norms[1](x))
        else:
            x = self.step(1, self.step(0, x))
        if self.book is not None:
            self.book.outputs.append(x)
        return (x, None) if self.shape.returns_tuple else x


class DrawnViT(nn.Module):
    """The model of a `Shape`, in eval mode, in float64; the same weights every time."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(shape.seed)
            self._build(shape)
            self.double()
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter))
        self.eval().requires_grad_(not shape.frozen)

    def _build(self, shape: Shape) -> None:
        self.shape, width = shape, shape.width
        self.patches = nn.Conv2d(shape.channels, width, 2, stride=2)
        self.position = nn.Parameter(torch.randn(1, shape.tokens, width))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.norm = Norm(width, shape.norm) if shape.final_norm else nn.Identity()
        self.query = nn.Parameter(torch.randn(1, 1, width))
        self.pool = Attention(shape, 1) if shape.pool else None
        self.head = nn.Linear(width, shape.classes)

    def forward(self, images: Tensor) -> Tensor:  # [B, channels, 2 gh, 2 gw] -> [B, classes]
        shape = self.shape
        x = F.pad(self.patches(images).flatten(2).transpose(1, 2), (0, 0, shape.prefix, 0)) + self.position
        x = x.transpose(0, 1) if shape.tokens_first else x
        streams = []
        for block in self.blocks:
            x = block(x)[0] if shape.returns_tuple else block(x)
            streams.append(x)
        if self.pool is not None:
            start, stop = shape.span(shape.pool)
            x = self.norm(x) if shape.final_norm == "tokens" else x
            query = self.query.expand(len(images), -1, -1)
            query = query.transpose(0, 1) if shape.tokens_first else query
            tokens = x[start:stop] if shape.tokens_first else x[:, start:stop]
            vector = self.pool(query, tokens).flatten(0, 1)
        else:
            vector = sum(read.weight * self._pooled(streams[read.depth - 1], read) for read in shape.reads)
        vector = self.norm(vector) if shape.final_norm == "vector" else vector
        return self.head(vector) * shape.logit_scale

    def _pooled(self, x: Tensor, read: Read) -> Tensor:  # -> [B, C]
        x = self.norm(x) if self.shape.final_norm == "tokens" else x
        start, stop = self.shape.span(read.what)
        x = x.transpose(0, 1) if self.shape.tokens_first else x
        return x[:, start] if read.what == "token" else x[:, start:stop].mean(1)

    def layout(self) -> ModelLayout:
        """Of the last read."""
        what = self.shape.pool or self.shape.reads[-1].what
        pooling: Pooling = "attention" if self.shape.pool else "token" if what == "token" else "average"
        return ModelLayout(
            tuple(self.blocks), self.shape.prefix, self.shape.grid, pooling, self.shape.span(what),
            in_chans=self.shape.channels, d_model=self.shape.width, tokens_first=self.shape.tokens_first,
        )  # fmt: skip
