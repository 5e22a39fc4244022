"""Per-token normalisation that an SAE was trained behind, and its inverse.

Source: ViT-Prisma's run-time activation normalisation. Its "layer_norm" is not torch's: the standard deviation is the
unbiased one (divisor C - 1) and the epsilon is added outside the square root.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from fga_fast.settings import Normalisation

LAYER_NORM_EPS = 1e-5


def normalise(
    x: Tensor,  # [..., C]
    kind: str | None,
) -> Tensor:
    """Normalise every token over its width.

    Args:
        x: [..., C], any floating dtype.
        kind: None (identity), "layer_norm": ``(x - mean) / (std + 1e-5)`` with the unbiased std, or "constant_norm":
            ``x * sqrt(C) / ||x||`` (a zero token stays zero).

    Returns:
        [..., C], dtype of ``x``.

    Raises:
        ValueError: ``kind`` is none of these.
    """
    check_normalisation(kind)
    if kind is None:
        return x
    if kind == "layer_norm":
        centred = x - x.mean(dim=-1, keepdim=True)
        return centred / (x.std(dim=-1, keepdim=True, unbiased=True) + LAYER_NORM_EPS)
    return x / _constant_norm_scale(x)


def denormalise(
    y: Tensor,  # [..., C]
    x: Tensor,  # [..., C]
    kind: str | None,
) -> Tensor:
    """Bring ``y``, a reconstruction of ``normalise(x, kind)``, back to the scale of ``x``.

    As in ViT-Prisma, "layer_norm" multiplies by the std without the epsilon, so it is the inverse up to 1e-5 / std.

    Args:
        y: [..., C], decoder output in the normalised space.
        x: [..., C], the tokens whose statistics are put back.
        kind: see `normalise`.

    Returns:
        [..., C].

    Raises:
        ValueError: ``kind`` is not known.
    """
    y = rescale(y, x, kind)
    return y + x.mean(dim=-1, keepdim=True) if kind == "layer_norm" else y


def rescale(
    change: Tensor,  # [..., C]
    x: Tensor,  # [..., C]
    kind: str | None,
) -> Tensor:
    """What a change of a reconstruction in the normalised space is at the scale of ``x``: `denormalise` is this and the
    mean.

    Raises:
        ValueError: ``kind`` is not known.
    """
    check_normalisation(kind)
    if kind is None:
        return change
    if kind == "layer_norm":
        return change * x.std(dim=-1, keepdim=True, unbiased=True)
    return change * _constant_norm_scale(x)


def check_normalisation(kind: object) -> None:
    """Raise ValueError unless ``kind`` is None or the name of a known normalisation."""
    known = get_args(Normalisation)
    if kind is not None and kind not in known:
        raise ValueError(f"normalize: expected None or one of {', '.join(map(repr, known))}, got {kind!r}")


def _constant_norm_scale(
    x: Tensor,  # [..., C]
) -> Tensor:
    norm = x.norm(dim=-1, keepdim=True)
    # A zero token has no direction to rescale; dividing by its norm would turn it into NaN.
    return torch.where(norm == 0, torch.ones_like(norm), norm / x.shape[-1] ** 0.5)
