"""The rollout as a matrix: relevance of every token of the first block for every token after the last one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fga_fast.models.layout import ModelLayout


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
    """Rollout of the (gated) relevance maps of all blocks, given in forward order.

    Equation: `R = (I + Cbar_L) ... (I + Cbar_1)`.

    Returns:
        R [B, N, N]; row i holds the relevance of all input tokens for output token i.

    Raises:
        ValueError: there is no map.
    """
    if not relevance:
        raise ValueError("relevance: expected one map a block, got none")
    identity = torch.eye(relevance[0].shape[-1], dtype=relevance[0].dtype, device=relevance[0].device)
    result = identity.expand_as(relevance[0])
    for block in relevance:
        result = (identity + block) @ result
    return result


def pooled_row(
    matrix: Tensor,  # [B, N, N], R
    layout: ModelLayout,
    pool_relevance: Tensor | None = None,  # [B, 1, stop - start], Cbar of an attention pool over the tokens it reads
) -> Tensor:
    """Row of R for the vector that the model's head reads.

    token: the row of the class token. average: the mean of the pooled tokens' rows. attention: the pool's own relevance
    row over the tokens that it reads, times R.

    Returns:
        [B, N], relevance of every input token.

    Raises:
        ValueError: an attention pool without its relevance row.
    """
    start, stop = layout.pooled
    if layout.pooling == "token":
        return matrix[:, start]
    if layout.pooling == "average":
        return matrix[:, start:stop].mean(dim=1)
    if pool_relevance is None:
        raise ValueError("pool_relevance: expected the attention pool's relevance row [B, 1, tokens], got None")
    return (pool_relevance @ matrix[:, start:stop]).squeeze(1)
