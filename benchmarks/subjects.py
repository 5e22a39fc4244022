"""What is measured: a ViT-B/16 with random weights, and SAEs whose sparsity is set on that model's own activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fga_fast import SparseAutoencoder
from fga_fast.models.timm_import import import_timm

WIDTH = 768


def images(batch: int, size: int = 224) -> Tensor:
    """Seeded noise [batch, 3, size, size], normalised as a model's input is."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def vit(size: int = 224, depth: int = 12, patch: int = 16) -> nn.Module:
    """timm's ViT-B/16 for square images, random weights; fewer blocks, larger images or other patches on request."""
    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=size, patch_size=patch, embed_dim=WIDTH, depth=depth, num_heads=12,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    return model.eval().requires_grad_(False)


def streams(model: nn.Module, blocks: Sequence[int], inputs: Tensor) -> dict[int, Tensor]:
    """Residual stream [batch * patches, C] after each of the blocks, at the patches."""
    found: dict[int, Tensor] = {}

    def keep(block: int) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _inputs, output: found.update({block: output[:, 1:].flatten(0, 1)})

    handles = [model.get_submodule(f"blocks.{block}").register_forward_hook(keep(block)) for block in blocks]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return found


class Dictionary:
    """Random directions for one residual stream; makes SAEs of any sparsity from them.

    Args:
        x: residual stream [tokens, C] on which the sparsity is set.
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
        """An SAE with about L0 active features a token, and how many there are.

        One threshold, in standard deviations, for all features: each fires where it is unusually strong, so that tokens
        differ in their features as they do under a trained SAE.
        """
        features = self._W_enc.shape[1]
        rank = max(1, round(self._standard.numel() * (1 - L0 / features)))
        threshold = self._standard.kthvalue(rank).values
        bias = -(self._mean + threshold * self._std)
        active = int((self._standard > threshold).sum()) / len(self._x)
        return SparseAutoencoder(self._W_enc, bias, self._W_dec, torch.zeros(WIDTH)), active

    def topk(self, k: int) -> SparseAutoencoder:
        """An SAE with k active features a token."""
        zeros = torch.zeros(WIDTH)
        return SparseAutoencoder(self._W_enc, -self._mean, self._W_dec, zeros, activation="topk", k=k)
