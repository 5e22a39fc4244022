"""Dictionaries and inputs of the score tests, and what scores and strongest features are compared to."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from fga_fast import ops, reference
from fga_fast.sae import SparseAutoencoder
from fga_fast.settings import Activation

ACTIVATIONS = get_args(Activation)


def make_sae(
    activation: str, width: int = 24, features: int = 70, dtype: torch.dtype = torch.float64, k: int = 5,
    normalize: str | None = None, shift: float = 0.0,
) -> SparseAutoencoder:  # fmt: skip
    """`shift` moves the encoder bias, so that many (positive) or few (negative) features fire."""
    more: dict[str, Any] = {}
    if activation in ("topk", "topk_signed"):
        more["k"] = k
    if activation in ("jumprelu", "batch_topk"):
        more["threshold"] = torch.rand(features, dtype=dtype) if activation == "jumprelu" else 0.7
    if activation == "gated":
        more |= {name: torch.randn(features, dtype=dtype) for name in ("b_gate", "r_mag", "b_mag")}
    return SparseAutoencoder(
        torch.randn(width, features, dtype=dtype) / width**0.5, torch.randn(features, dtype=dtype) + shift,
        torch.randn(features, width, dtype=dtype), torch.randn(width, dtype=dtype), activation=activation,
        normalize=normalize, **more,
    )  # fmt: skip


def sample(
    images: int, patches: int, width: int = 24, dtype: torch.dtype = torch.float64, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Residual stream and gradient with a prefix token cut off, so that neither is contiguous."""
    x = torch.randn(images, patches + 1, width, dtype=dtype)[:, 1:]
    g = torch.randn(images if rows is None else rows, patches + 1, width, dtype=dtype)[:, 1:]
    return x, g


def truth(x: Tensor, g: Tensor, sae: SparseAutoencoder, mode: str = "combined", **more: Any) -> Tensor:
    wide = sae if sae.dtype == torch.float64 else SparseAutoencoder.double(copy_of(sae))
    return reference.score(x.double(), g.double(), wide, mode, **more)


def copy_of(sae: SparseAutoencoder) -> SparseAutoencoder:
    return SparseAutoencoder(
        sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.activation, sae.k, sae.threshold, sae.normalize,
        b_gate=sae.b_gate, r_mag=sae.r_mag, b_mag=sae.b_mag,
    )  # fmt: skip


def check_top(
    got: ops.Score, x: Tensor, g: Tensor, sae: SparseAutoencoder, mode: str = "combined", **more: Any
) -> None:
    """Compares strengths, and that each named feature has the contribution it is listed with."""
    contributions = reference.contributions(x, g, sae, mode, **more)
    k = got.image_index.shape[-1]
    for index, value, dense in (
        (got.patch_index, got.patch_contribution, contributions),
        (got.image_index, got.image_contribution, contributions.sum(1)),
    ):
        strongest = dense.abs().sort(-1, descending=True).values[..., :k]
        torch.testing.assert_close(value.abs(), strongest, rtol=1e-8, atol=1e-9)
        listed = dense.gather(-1, index.clamp(min=0))
        torch.testing.assert_close(value, torch.where(index >= 0, listed, 0.0), rtol=1e-8, atol=1e-9)
        assert bool(((index >= 0) | (value == 0)).all())
        named = [row[row >= 0].tolist() for row in index.reshape(-1, k)]
        assert all(len(set(row)) == len(row) for row in named), "a feature is listed twice"
