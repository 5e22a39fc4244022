"""Where a rollout starts: the rows of relevance that enter at the outputs of blocks, from the gradients that arrive.

A head reads vectors: the class token of a block, the mean of its patches, and so on. Each vector that it reads starts
with 1. If two have parallel gradients, the head reads their sum, and they share the 1 as the sum weighs them. How much
the explained value depends on a vector is in the gradients of the attention maps already, as everywhere in TransMM.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fga_fast.models.head import groups, laid_out
from fga_fast.models.layout import ModelLayout
from fga_fast.precision import relevance_dtype
from fga_fast.settings import LITTLE, PARALLEL


def start_rows(gradients: Mapping[int, Tensor], layout: ModelLayout) -> dict[int, Tensor]:
    """Rows of relevance that enter after blocks.

    Args:
        gradients: block -> [..., B, N, C], what arrives at its output from outside the next block. Any scale.

    Returns:
        block -> [..., B, N]. An image without any gradient gets the layout's row after the last of the blocks.
    """
    wide = {block: g.to(relevance_dtype(g.dtype)) for block, g in gradients.items()}
    # Squares of tiny gradients would underflow, so lengths are taken of multiples of the largest entry.
    largest = torch.stack([g.abs().amax((-1, -2)) for g in wide.values()]).amax(0)[..., None, None]
    unit = largest.where(largest > 0, 1)
    scaled = {block: g / unit for block, g in wide.items()}
    lengths = {block: g.square().sum(-1).sqrt() for block, g in scaled.items()}  # [..., B, N]
    ranges = groups(layout)
    amounts = torch.cat([_sums(length.unsqueeze(-1), ranges) for length in lengths.values()], -2)  # [..., B, M, 1]
    directions = F.normalize(torch.cat([_sums(g, ranges) for g in scaled.values()], -2), dim=-1)  # [..., B, M, C]
    # What is read next to nothing, a group's share of rounding say, would start with as much as all else.
    little = max(LITTLE, torch.finfo(next(iter(gradients.values())).dtype).eps) * amounts.amax(-2, keepdim=True)
    amounts = amounts.where(amounts > little, 0)
    same = (directions @ directions.mT).abs() > PARALLEL
    same = same | torch.eye(same.shape[-1], dtype=torch.bool, device=same.device)
    shared = same.to(amounts.dtype) @ amounts
    weights = torch.split((amounts / shared.where(shared > 0, 1)).squeeze(-1), len(ranges), -1)  # of [..., B, groups]
    last = max(lengths)
    promised = laid_out(lengths[last].reshape(-1, layout.tokens)[:1], layout)[0]  # [N]
    rows = {}
    for weight, (block, length) in zip(weights, lengths.items(), strict=True):
        otherwise = promised if block == last else torch.zeros_like(promised)
        rows[block] = _spread(weight, length, ranges).where(largest.squeeze(-1) > 0, otherwise)
    return rows


def _sums(tokens: Tensor, ranges: list[tuple[int, int]]) -> Tensor:  # [..., N, C] -> [..., groups, C]
    return torch.stack([tokens[..., first:last, :].sum(-2) for first, last in ranges], -2)


def _spread(weights: Tensor, lengths: Tensor, ranges: list[tuple[int, int]]) -> Tensor:
    """A group's weight, evenly over those of its tokens that have a gradient: [..., groups], [..., N] -> [..., N].

    Evenly, because norms between a block and the pooling change the gradients of tokens, not their weight in the mean.
    """
    parts = []
    for index, (first, last) in enumerate(ranges):
        read = (lengths[..., first:last] > 0).to(weights.dtype)
        parts.append(read * (weights[..., index : index + 1] / read.sum(-1, keepdim=True).clamp(min=1)))
    return torch.cat(parts, -1)
