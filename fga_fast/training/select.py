"""Which features of a token, or of a batch of tokens, get a code."""

from __future__ import annotations

import torch
from torch import Tensor

from fga_fast.training.places import Dense, Sparse

_MOST = 1 / 16  # share of all places above which the products of a sparse matrix cost more than those of a dense one


def top(
    pre: Tensor,  # [T, F]
    k: int,
) -> Sparse:
    """The k largest of each token."""
    tokens, features = pre.shape
    feature = _top_indices(pre, k)
    row = torch.arange(tokens, device=pre.device).repeat_interleave(k)
    return Sparse(feature.flatten(), row, tokens, tokens, features)


def top_of_batch(
    pre: Tensor,  # [T, F]
    k: int,
    guess: Tensor,  # []
    prefixes: tuple[int, ...] = (),
) -> Sparse:
    """The k T largest of all tokens together that are above 0.

    Args:
        pre, k: see above.
        guess: about the smallest that will be among them; decides how much is looked at, never what comes out.
        prefixes: sizes of nested dictionaries; the places are then in one row for each group and token.
    """
    tokens, features = pre.shape
    flat, wanted = pre.flatten(), k * tokens
    at = (flat > 0.8 * guess).nonzero()[:, 0]
    if len(at) < wanted:
        at = (flat > 0).nonzero()[:, 0]
    if len(at) > wanted:
        at = at.index_select(0, flat.index_select(0, at).topk(wanted, sorted=False).indices).sort().values
    row, feature = at // features, at % features
    if len(prefixes) > 1:
        group = torch.bucketize(feature, torch.tensor(prefixes, device=pre.device), right=True)
        row, order = (group * tokens + row).sort(stable=True)
        feature = feature[order]
    return Sparse(feature, row, tokens * max(1, len(prefixes)), tokens, features)


def above(
    pre: Tensor,  # [T, F]
    least: Tensor | float,  # [F] or a number
) -> Dense | Sparse:
    """All that are above a threshold; `Dense` if they are many."""
    tokens, features = pre.shape
    which = pre > least
    if which.sum() > _MOST * which.numel():
        return Dense(features)
    row, feature = which.nonzero(as_tuple=True)
    return Sparse(feature, row, tokens, tokens, features)


def _top_indices(
    pre: Tensor,  # [T, F]
    k: int,
    parts: int = 8,
) -> Tensor:
    """Indices [T, k] of each row's largest, in no order.

    Each of the k largest lies in one of the k groups of `parts` features whose own largest are largest, so most
    features are never sorted.
    """
    tokens, features = pre.shape
    if features % parts or features < 2 * k * parts:
        return pre.topk(k, sorted=False).indices
    group = pre.view(tokens, parts, features // parts).amax(1).topk(k, sorted=False).indices  # [T, k]
    offsets = torch.arange(0, features, features // parts, device=pre.device)
    candidates = (group[:, None] + offsets[:, None]).flatten(1)  # [T, parts k]
    return candidates.gather(1, pre.gather(1, candidates).topk(k, sorted=False).indices)
