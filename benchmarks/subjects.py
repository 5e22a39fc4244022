"""The measured model and SAEs: a ViT-B/16 with random weights, and SAEs with a sparsity set on its activations."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn

from fga_fast import SparseAutoencoder
from fga_fast.models.timm_import import import_timm
from fga_fast.ops.round_encoder import round_encoder

WIDTH = 768


def images(batch: int, size: int = 224) -> Tensor:
    """Seeded noise [batch, 3, size, size], normalised like a model's input."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def vit(size: int = 224, depth: int = 12, patch: int = 16) -> nn.Module:
    """timm's ViT-B/16 with random weights, for square images of `size` pixels."""
    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=size, patch_size=patch, embed_dim=WIDTH, depth=depth, num_heads=12,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    return model.eval().requires_grad_(False)


def streams(model: nn.Module, blocks: Sequence[int], inputs: Tensor) -> dict[int, Tensor]:
    """The patches' residual stream [B * P, C] after each of the blocks."""
    found: dict[int, Tensor] = {}

    def keep(block: int) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _inputs, output: found.update({block: output[:, 1:].flatten(0, 1)})

    handles = [model.get_submodule(f"blocks.{block}").register_forward_hook(keep(block)) for block in blocks]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return found


def dense_encoder(work: Callable[[], object]) -> Callable[[], object]:
    """The same work without the bounded product of the native score."""

    def call() -> object:
        with mock.patch.dict(os.environ, FGA_FAST_BOUND="0"):
            return work()

    return call


def possible(x: Tensor, sae: SparseAutoencoder) -> float:  # x [tokens, C], of a relu
    """How many features the bounds leave, for each one that is active; the formula of csrc/cpu/bound.h in PyTorch."""
    w_rounded, w_length, w_error = _rounded_rows(sae.W_enc.t())
    x_rounded, x_length, x_error = _rounded_rows(x)
    z = x_rounded @ w_rounded.t()  # [tokens, F]
    upper = z + x_error[:, None] * w_length + x_length[:, None] * w_error + sae.bias
    return float((upper > 0).sum() / (x @ sae.W_enc + sae.bias > 0).sum())


def _rounded_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [n, C] -> [n, C], [n], [n]
    """What rows are rounded to, and the lengths of row and error."""
    integers, limits = round_encoder(rows)
    scale, length, error = limits[:, : len(rows)]
    whole = integers.transpose(1, 2).flatten(2).flatten(0, 1)[: len(rows), : rows.shape[1]]
    return whole * scale[:, None], length, error


class Dictionary:
    """Random directions for one residual stream; makes SAEs of any sparsity.

    Args:
        x: residual stream [tokens, C]; sets the sparsity.
        features: size of the dictionary.
    """

    def __init__(self, x: Tensor, features: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._x = x
        self._W_enc = torch.randn(features, WIDTH, generator=generator).div_(WIDTH**0.5).t()  # [C, F]
        self._W_dec = torch.randn(features, WIDTH, generator=generator).div_(WIDTH**0.5)  # [F, C]
        z = x @ self._W_enc  # [tokens, F]
        self._mean, self._std = z.mean(dim=0), z.std(dim=0)
        self._standard = z.sub_(self._mean).div_(self._std).flatten()

    def relu(self, L0: float) -> tuple[SparseAutoencoder, float]:
        """An SAE with about L0 active features per token, and their exact mean number.

        All features share one threshold in standard deviations. Each fires where it is unusually strong, so tokens
        differ in their features, as with a trained SAE.
        """
        features = self._W_enc.shape[1]
        rank = max(1, round(self._standard.numel() * (1 - L0 / features)))
        threshold = self._standard.kthvalue(rank).values
        bias = -(self._mean + threshold * self._std)
        active = int((self._standard > threshold).sum()) / len(self._x)
        return SparseAutoencoder(self._W_enc, bias, self._W_dec, torch.zeros(WIDTH)), active

    def topk(self, k: int) -> SparseAutoencoder:
        """An SAE with k active features per token."""
        zeros = torch.zeros(WIDTH)
        return SparseAutoencoder(self._W_enc, -self._mean, self._W_dec, zeros, activation="topk", k=k)
