"""Where the rollout starts: which tokens of which blocks' outputs the explained value reads, and how much each counts.

The rollout is linear in the row it starts from, so several starts add up.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fga_fast.models.layout import ModelLayout
from fga_fast.precision import relevance_dtype


def start_rows(gradients: Mapping[int, Tensor], layout: ModelLayout) -> dict[int, Tensor]:
    """The row of relevance that enters after every block that is read.

    Equation: token t after block l counts by its share of the gradient, `|d_lt| / sum_{l', t'} |d_l't'|`, with `d_lt`
    what arrives at x_lt other than through block l + 1. Within a group of tokens that pool together (the patches, and
    the tokens that the layout averages) the group's share is spread evenly over the tokens with a gradient.

    Args:
        gradients: block -> d_l [B, N, C].
        layout: says which tokens pool together, and what an image without any gradient starts from.

    Returns:
        block -> [B, N]; the rows of an image sum to 1 over tokens and blocks.
    """
    return_dtype = relevance_dtype(next(iter(gradients.values())).dtype)
    images, last = len(next(iter(gradients.values()))), max(gradients)
    rows = {block: torch.zeros(g.shape[:2], dtype=return_dtype, device=g.device) for block, g in gradients.items()}
    for image in range(images):
        # Lengths in float64, where the squares of tiny gradients do not underflow.
        lengths = {block: g[image].double().norm(dim=-1) for block, g in gradients.items()}  # [N]
        total = sum(float(length.sum()) for length in lengths.values())
        for block, length in lengths.items():
            for group in groups(layout):
                read = [token for token in group if length[token] > 0]
                share = float(length[read].sum()) / total if read else 0.0
                for token in read:
                    rows[block][image, token] = share / len(read)
        if total == 0:
            start, stop = layout.pooled
            rows[last][image, start:stop] = 1 / (stop - start)
    return rows


def groups(layout: ModelLayout) -> list[list[int]]:
    """Tokens that pool together: the patches, with the tokens that the layout averages; every other token alone."""
    patches = set(range(layout.prefix_tokens, layout.tokens))
    pooled = set(range(*layout.pooled)) if layout.pooling == "average" else set()
    together = [pooled | patches] if pooled & patches else [patches] + [pooled] * bool(pooled)
    alone = set(range(layout.tokens)).difference(*together)
    return [sorted(group) for group in together] + [[token] for token in sorted(alone)]
