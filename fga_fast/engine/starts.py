"""Where a rollout starts: the rows of relevance that enter at the outputs of blocks, from the gradients that arrive.

A token counts by its share of the gradient, measured by its length over the width C. So a class token alone gets 1, and
a sum s_1 x_1 + s_2 x_2 of two blocks' outputs gets s_1 and s_2, scaled to a sum of 1. Patches that are read count
equally, as in average pooling: norms between a block and the head would change their gradients, not their weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fga_fast.models.layout import ModelLayout
from fga_fast.precision import relevance_dtype


def laid_out(carrier: Tensor, layout: ModelLayout) -> Tensor:  # [B, N] -> [B, N]
    """The row that the layout's pooling promises: 1 / n at each of the n pooled tokens."""
    first, last = layout.pooled
    pooled = carrier.new_full((len(carrier), last - first), 1.0 / (last - first))
    return F.pad(pooled, (first, carrier.shape[1] - last))


def start_rows(gradients: Mapping[int, Tensor], layout: ModelLayout) -> dict[int, Tensor]:
    """Rows of relevance that enter after blocks; they sum to 1.

    Args:
        gradients: block -> [..., B, N, C], what arrives at its output from outside the next block. Any scale.

    Returns:
        block -> [..., B, N]. An image without any gradient gets the layout's row after the last of the blocks.
    """
    wide = {block: g.to(relevance_dtype(g.dtype)) for block, g in gradients.items()}
    # Squares of tiny gradients would underflow, so lengths are taken of multiples of the largest entry.
    largest = torch.stack([g.abs().amax((-1, -2)) for g in wide.values()]).amax(0)[..., None, None]
    unit = largest.where(largest > 0, 1)
    rows = {block: _counted((g / unit).square().sum(-1).sqrt(), layout) for block, g in wide.items()}
    total = torch.stack([row.sum(-1) for row in rows.values()]).sum(0).unsqueeze(-1)  # [..., B, 1]
    last = max(rows)
    promised = laid_out(rows[last].reshape(-1, layout.tokens)[:1], layout)[0]  # [N]
    some, divisor = total > 0, total.where(total > 0, 1)
    return {
        block: (row / divisor).where(some, promised if block == last else torch.zeros_like(promised))
        for block, row in rows.items()
    }


def _counted(lengths: Tensor, layout: ModelLayout) -> Tensor:  # [..., B, N] -> [..., B, N]
    """The same, with the sum over each group of tokens that pool together spread evenly over those that are read."""
    parts, done = [], 0
    for first, last in _groups(layout):
        group = lengths[..., first:last]
        read = (group > 0).to(group.dtype)
        even = group.sum(-1, keepdim=True) / read.sum(-1, keepdim=True).clamp(min=1)
        parts += [lengths[..., done:first], read * even]
        done = last
    return torch.cat([*parts, lengths[..., done:]], dim=-1)


def _groups(layout: ModelLayout) -> list[tuple[int, int]]:
    """Token ranges that pool together: the patches, and what the layout averages."""
    patches, pooled = (layout.prefix_tokens, layout.tokens), layout.pooled
    if layout.pooling != "average":
        return [patches]
    if pooled[1] <= patches[0]:
        return [pooled, patches]
    return [(min(pooled[0], patches[0]), patches[1])]
