"""Attention rollout: attention of all blocks multiplied, as if nothing but attention moved tokens.

    row (A_L / 2 + I / 2) ... (A_1 / 2 + I / 2)        at the patches, A_l averaged over heads

S. Abnar, W. Zuidema: Quantifying Attention Flow in Transformers, ACL 2020. The halves are their account of the residual
connection; the rows of the sum add up to 1 as they are. `row` says how the head weighs tokens: 1 at a class token, 1/n
at each of n averaged patches, the pool's own attention for an attention pool (`recorded.record`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fga_fast.evaluation.methods.recorded import record
from fga_fast.evaluation.subject import Subject


def attention_rollout(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:
    """Attention rollout over all blocks up to the last one that the head reads.

    Args:
        images: [B, channels, H, W].
        targets: [B]; the map is the same for all.

    Returns:
        [B, P], at least 0.
    """
    found = record(subject, images, targets)
    row = torch.zeros_like(next(iter(found.rows.values())))  # [B, N]
    for block in range(found.deepest, -1, -1):
        row = row + found.rows.get(block, 0)
        if block in found.maps:
            attention = found.maps[block].mean(1)  # [B, N, N]
            row = row / 2 + (row.unsqueeze(1) @ attention).squeeze(1) / 2
    return found.patches(row)
