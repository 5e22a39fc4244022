"""The SAE features that contribute most to a score."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TopFeatures(NamedTuple):
    """The k strongest SAE features of one block; with K targets an image, [B,P,k] is [B,K,P,k] and so on."""

    patch_index: Tensor  # [B, P, k] int64, feature numbers
    patch_contribution: Tensor  # [B, P, k] code times feature gradient
    image_index: Tensor  # [B, k] int64
    image_contribution: Tensor  # [B, k] summed over the image's patches


def strongest(contributions: Tensor, k: int) -> tuple[Tensor, Tensor]:  # [..., F] -> [..., k] twice
    """The k largest contributions in magnitude, with their sign, ties to the lowest feature.

    Returns:
        index, int64, -1 where fewer than k features contribute; and the contribution, 0 there.
    """
    # A stable sort keeps equal strengths in the order of their indices; torch.topk promises no order.
    # No slice: one of all features is an alias, for which vmap has no rule.
    order = contributions.abs().sort(dim=-1, descending=True, stable=True).indices.narrow(-1, 0, k)
    value = contributions.gather(-1, order)
    return torch.where(value == 0, -1, order), value
