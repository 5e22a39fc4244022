"""timm's VisionTransformer written out by hand, and methods over it: a second definition, for the tests of methods.

It shares no line with the library but the SAE's own functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fga_fast import SparseAutoencoder

Score = Callable[[Tensor, Tensor, SparseAutoencoder], Tensor]  # x, g [P, C], the SAE -> [P]


class PlainViT:
    """One forward pass on one image, with attention in the open and everything that is needed kept in the graph."""

    def __init__(self, model: Any, image: Tensor, target: int, conservative: bool = False) -> None:  # [3, H, W]
        self.model, self.target, self.conservative = model, target, conservative
        self.prefix, self.maps, self.streams = model.num_prefix_tokens, [], []
        x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]  # [N, C]
        self.streams.append(x)  # streams[l] enters block l, streams[l + 1] leaves it
        for block in model.blocks:
            x = x + self.attend(block.attn, self.norm(block.norm1, x))
            x = x + block.mlp.fc2(self.gelu(block.mlp.fc1(self.norm(block.norm2, x))))
            self.streams.append(x)
        self.value = self.head(x)

    def norm(self, norm: Any, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        std = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        return centred / (std.detach() if self.conservative else std) * norm.weight + norm.bias

    def gelu(self, z: Tensor) -> Tensor:
        return z * (F.gelu(z) / z).detach() if self.conservative else F.gelu(z)

    def attend(self, attention: Any, x: Tensor) -> Tensor:
        q, k, v = attention.qkv(x).unflatten(1, (3, attention.num_heads, -1)).permute(1, 2, 0, 3)  # [H, N, D]
        maps = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)  # [H, N, N]
        if self.conservative:
            maps = maps.detach().requires_grad_()
        self.maps.append(maps)
        return attention.proj((maps @ v).transpose(0, 1).flatten(1))

    def head(self, x: Tensor) -> Tensor:  # [N, C] -> []
        x = x if isinstance(self.model.norm, torch.nn.Identity) else self.norm(self.model.norm, x)
        pooled = x[0] if self.model.global_pool == "token" else x[self.prefix :].mean(0)
        if not isinstance(self.model.fc_norm, torch.nn.Identity):
            pooled = self.norm(self.model.fc_norm, pooled)
        return self.model.head(pooled)[self.target]

    def row(self) -> Tensor:  # [N], of what the head reads
        row = torch.zeros(len(self.streams[0]), dtype=torch.float64)
        if self.model.global_pool == "token":
            row[0] = 1
        else:
            row[self.prefix :] = 1 / (len(row) - self.prefix)
        return row

    def gradients(self, of: list[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(self.value, of, retain_graph=True))

    def patches(self, index: int) -> tuple[Tensor, Tensor]:  # x, g [P, C]
        (g,) = self.gradients([self.streams[index]])
        return self.streams[index][self.prefix :].detach(), g[self.prefix :]

    def after(self, block: int) -> tuple[Tensor, Tensor]:  # x, g [P, C]
        return self.patches(block + 1)

    # -- methods ------------------------------------------------------------------------------------------------

    def transmm(self, gates: Mapping[int, Tensor] | None = None) -> Tensor:  # block -> [P]
        R = torch.eye(len(self.streams[0]), dtype=torch.float64)
        for block, (maps, d) in enumerate(zip(self.maps, self.gradients(self.maps), strict=True)):
            C = (maps.detach() * d).clamp(min=0).mean(0)
            if gates and block in gates:
                C[:, self.prefix :] *= gates[block]
            R = R + C @ R
        return (self.row() @ R)[self.prefix :]

    def gates(self, saes: Mapping[int, SparseAutoencoder], score: Score, base: float = 10.0) -> dict[int, Tensor]:
        found = {}
        for block, sae in saes.items():
            x, g = self.after(block)
            # Scores of tiny gradients are measured in a power of two, so that the constant in the gate is tiny too.
            ratio = min(1.0, max(float(g.abs().max()) * 2**10, 2.0**-100))
            of_gradients = score is not activation_only
            found[block] = gate(score(x, g, sae) / (2.0 ** math.floor(math.log2(ratio)) if of_gradients else 1), base)
        return found

    def contribution(self, index: int = 0) -> Tensor:  # [P]
        x, g = self.patches(index)
        return (x * g).sum(-1)


def gate(scores: Tensor, base: float) -> Tensor:  # [P] -> [P]
    middle = (len(scores) - 1) // 2
    s = scores - scores.sort().values[middle]
    return base ** torch.tanh(s / (1.4826 * (s.abs().sort().values[middle] + 1e-8)))


def activation_only(x: Tensor, g: Tensor, sae: SparseAutoencoder) -> Tensor:
    return sae.encode(x).sum(-1)


def combined(x: Tensor, g: Tensor, sae: SparseAutoencoder) -> Tensor:
    return (sae.encode(x) * (g @ sae.W_dec.T)).sum(-1)
