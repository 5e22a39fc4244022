"""The rollout as a matrix: relevance of every token of the first block for every token after the last one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gate_columns(
    relevance: Tensor,  # [B, N, N], Cbar of one block
    gates: Tensor,  # [B, P]
    prefix_tokens: int,
) -> Tensor:
    """Multiply the patch columns of a relevance map by the patches' gates; prefix columns stay as they are.

    Equation: `Cbar[:, prefix + p] <- w_p * Cbar[:, prefix + p]`.

    Returns:
        The gated map [B, N, N].

    Raises:
        ValueError: the map's columns are not the prefix tokens and one column a patch.
    """
    if relevance.shape[-1] != prefix_tokens + gates.shape[-1]:
        raise ValueError(
            f"gates: expected {relevance.shape[-1] - prefix_tokens} patches (N - prefix_tokens), got {gates.shape[-1]}"
        )
    prefix = gates.new_ones(gates.shape[0], prefix_tokens)
    columns = torch.cat((prefix, gates), dim=1)  # [B, N]
    return relevance * columns.unsqueeze(1)


def rollout(relevance: Sequence[Tensor]) -> Tensor:  # L maps [B, N, N] -> [B, N, N]
    """Rollout of the (gated) relevance maps of all blocks, given in forward order, without the identity.

    Equation: `S = R - I` with `R = (I + Cbar_L) ... (I + Cbar_1)`; so `S <- S + Cbar_l + Cbar_l S` block by block.
    Where Cbar is tiny, the identity would swallow it.

    Returns:
        S [B, N, N]; row i of R = I + S holds the relevance of all input tokens for output token i.

    Raises:
        ValueError: there is no map.
    """
    if not relevance:
        raise ValueError("relevance: expected one map a block, got none")
    result = torch.zeros_like(relevance[0])
    for block in relevance:
        result = result + block + block @ result
    return result
