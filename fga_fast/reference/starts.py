"""Where the rollout starts: which tokens of which blocks' outputs the explained value reads.

The rollout is linear in the row it starts from, so several starts add up.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fga_fast.models.layout import ModelLayout
from fga_fast.precision import relevance_dtype
from fga_fast.settings import LITTLE, PARALLEL


def start_rows(gradients: Mapping[int, Tensor], layout: ModelLayout) -> dict[int, Tensor]:
    """The row of relevance that enters after every block that is read.

    Equation: a group i of tokens that pool together (all patches of a block, or one prefix token) has the amount
    `a_i = sum_t |d_t|` and the direction `D_i = sum_t d_t`, with `d_t` the gradient that arrives at token t other than
    through the next block. It starts with `a_i / sum_j a_j` over the groups j, of all blocks, whose directions are
    parallel to its own, `|cos(D_i, D_j)| > PARALLEL`, spread evenly over its tokens with a gradient.

    So a class token alone starts with 1; the mean of n patches with 1/n each; the class token beside that mean with
    both; and a sum `s_1 x_1 + s_2 x_2` over blocks, whose gradients are parallel, with s_1 and s_2 over their sum.

    A group with less than `LITTLE` (or the epsilon of a 16-bit dtype) of the largest amount counts as not read.

    Args:
        gradients: block -> d [B, N, C].
        layout: says which tokens pool together, and what an image without any gradient starts from.

    Returns:
        block -> [B, N], at least 0.
    """
    if not gradients:
        return {}
    some = next(iter(gradients.values()))
    dtype = relevance_dtype(some.dtype)
    rows = {block: torch.zeros(g.shape[:2], dtype=dtype, device=g.device) for block, g in gradients.items()}
    parts = [(block, group) for block in gradients for group in groups(layout)]
    for image in range(len(some)):
        # In float64, where the squares of tiny gradients do not underflow.
        d = {block: g[image].double() for block, g in gradients.items()}  # [N, C]
        amounts = [float(d[block][group].norm(dim=-1).sum()) for block, group in parts]
        little = max(LITTLE, torch.finfo(some.dtype).eps) * max(amounts)
        amounts = [amount if amount > little else 0.0 for amount in amounts]
        directions = [d[block][group].sum(0) for block, group in parts]
        for i, (block, group) in enumerate(parts):
            read = [token for token in group if d[block][token].norm() > 0]
            alike = [j for j in range(len(parts)) if j == i or _parallel(directions[i], directions[j])]
            for token in read:
                rows[block][image, token] = amounts[i] / (sum(amounts[j] for j in alike) or 1) / len(read)
        if not any(amounts):
            start, stop = layout.pooled
            rows[max(rows)][image, start:stop] = 1 / (stop - start)
    return rows


def groups(layout: ModelLayout) -> list[list[int]]:
    """Tokens that pool together: the patches, with the tokens that the layout averages; every other token alone."""
    patches = set(range(layout.prefix_tokens, layout.tokens))
    pooled = set(range(*layout.pooled)) if layout.pooling == "average" else set()
    together = [pooled | patches] if pooled & patches else [patches] + [pooled] * bool(pooled)
    alone = set(range(layout.tokens)).difference(*together)
    return [sorted(group) for group in together] + [[token] for token in sorted(alone)]


def _parallel(a: Tensor, b: Tensor) -> bool:  # [C] each
    largest = max(float(a.abs().max()), float(b.abs().max())) or 1.0
    return abs(float(cosine_similarity(a / largest, b / largest, dim=0, eps=1e-30))) > PARALLEL
