"""Patches in the order of their relevance, which of them are removed, and the area under what comes of it."""

from __future__ import annotations

import torch
from torch import Tensor


def places(maps: Tensor) -> Tensor:  # [..., P] -> [..., P] int64
    """Place of each patch in the order of relevance: 0 is the most relevant one, of equal ones the first."""
    order = maps.argsort(dim=-1, descending=True, stable=True)
    rising = torch.arange(maps.shape[-1], device=maps.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, rising)


def steps(patches: int, step: int) -> list[int]:
    """How many patches are removed at each point of a curve: 0, step, 2 step, ..., and all of them."""
    return [*range(0, patches, step), patches]


def first(place: Tensor, counts: list[int]) -> Tensor:  # [M, B, P] -> [K, M, B, P] bool
    """For each of K counts, the patches whose place is below it."""
    limits = torch.tensor(counts, device=place.device)
    return place < limits.view(-1, *(1,) * place.dim())


def area(curve: Tensor, counts: list[int]) -> Tensor:  # [K, M, B] -> [M, B]
    """Trapezoid area under a curve over the number of removed patches."""
    at = torch.tensor(counts, dtype=curve.dtype, device=curve.device)
    return torch.trapezoid(curve, at, dim=0)
