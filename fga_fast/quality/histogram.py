"""Counts of values between edges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MOST = 30  # bins of whole numbers


@dataclass(frozen=True)
class Histogram:
    """How many values lie between two edges.

    Attributes:
        edges: n + 1 rising numbers.
        counts: n whole numbers. Bin i holds values v with edges[i] <= v < edges[i + 1], the last one its end as well.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]


def histogram(values: Tensor, edges: Sequence[float]) -> Histogram:  # any shape
    """The histogram of values, of which none lies outside the edges."""
    limits = torch.tensor(edges, dtype=torch.float64)
    bins = torch.bucketize(values.double().flatten().cpu(), limits, right=True) - 1
    counts = torch.bincount(bins.clamp(0, len(edges) - 2), minlength=len(edges) - 1)
    return Histogram(tuple(map(float, edges)), tuple(counts.tolist()))


def whole_histogram(counts: Tensor) -> Histogram:  # [n] int64
    """How often 0, 1, 2, ... came, from the least to the largest that did, in at most 30 bins of equal width."""
    seen = counts.nonzero()[:, 0].tolist()
    step = math.ceil((seen[-1] - seen[0] + 1) / _MOST)
    edges = list(range(seen[0], seen[-1] + step + 1, step))
    return Histogram(tuple(map(float, edges)), tuple(int(counts[low : low + step].sum()) for low in edges[:-1]))


def percentiles(counts: Tensor) -> tuple[int, int, int]:  # [n] int64, how often 0, 1, 2, ... came
    """The 5th, 50th and 95th: the least number that so many percent do not exceed."""
    upto, total = counts.cumsum(0), int(counts.sum())
    low, middle, high = (int((upto * 100 >= percent * total).int().argmax()) for percent in (5, 50, 95))
    return low, middle, high
