"""Counts of values between edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
