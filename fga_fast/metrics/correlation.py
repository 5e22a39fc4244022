"""Correlation of many pairs of rows at once, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def pearson(a: Tensor, b: Tensor) -> Tensor:  # [..., n], [..., n] -> [...]
    """Pearson's correlation, in [-1, 1]; NaN where a row is constant."""
    return _normal(a).mul(_normal(b)).sum(-1).clamp(-1, 1)


def spearman(a: Tensor, b: Tensor) -> Tensor:  # [..., n], [..., n] -> [...]
    """Spearman's rank correlation, in [-1, 1]; equal values share their mean rank; NaN where a row is constant."""
    return pearson(ranks(a), ranks(b))


def ranks(values: Tensor) -> Tensor:  # [..., n] -> [..., n] float64
    """Ranks from 1 to n."""
    values = values.contiguous()
    rising = values.sort(-1).values
    below, upto = (torch.searchsorted(rising, values, right=right) for right in (False, True))
    return (below + upto + 1).double() / 2


def _normal(rows: Tensor) -> Tensor:
    """Rows less their mean, of length 1; NaN for a constant row, whose mean may be off by rounding."""
    rows = rows.double()
    constant = (rows == rows[..., :1]).all(-1, keepdim=True)
    centred = rows - rows.mean(-1, keepdim=True)
    length = centred.square().sum(-1, keepdim=True).sqrt()
    return torch.where(constant, torch.nan, centred / length)
