"""Cosines between decoder rows: near-copies within an SAE, and features that two SAEs share.

Products are computed tile by tile, so nothing of features x features is kept. Beside the weights there are their unit
rows, 150 MB for 49,152 float32 features of width 768 (for a comparison, three times that), and a tile.

Source of the comparison of seeds: Paulo and Belrose, "Sparse autoencoders trained on the same data learn different
features", 2025, arXiv:2501.16615. They pair features one to one; here a feature's partner may be that of others too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fga_fast.dataset.items import stable_number
from fga_fast.quality.histogram import Histogram, histogram
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder

MATCH = 0.9  # above this cosine two rows count as the same feature
_EDGES = [place / 20 for place in range(-20, 21)]
_TILE = 2048  # rows; a tile of float32 takes 16 MB
_CHANCE = 2048  # rows of each that the control compares, which say as much as all


@dataclass(frozen=True)
class Partners:
    """Each decoder row's largest cosine to rows of another SAE.

    Attributes:
        matched: share of the rows whose largest cosine is above 0.9, 0 to 1.
        mean: mean of the largest cosines, -1 to 1.
        cosines: their histogram.
    """

    matched: float
    mean: float
    cosines: Histogram


@dataclass(frozen=True)
class Stability:
    """What two SAEs of the same block, such as those of two seeds, have in common.

    Attributes:
        forth: rows of the SAE, partners in the second.
        back: rows of the second, partners in the SAE.
        chance: rows of the SAE, partners among as many random rows as the second has. Of 2,048 rows at most, drawn by
            chance.
        chance_back: random rows, partners in the SAE. Of 2,048 at most.
    """

    forth: Partners
    back: Partners
    chance: Partners
    chance_back: Partners


def stability(sae: SparseAutoencoder, second: SparseAutoencoder, seed: int = 0) -> Stability:
    """Compares the decoder rows of two SAEs.

    Raises:
        ValueError: they have different widths.
    """
    if sae.d_model != second.d_model:
        raise ValueError(
            f"second: expected an SAE of the width {sae.d_model}, got {second.d_model}; give one of the same block"
        )
    one, other = _unit(sae.W_dec), _unit(second.W_dec.to(sae.device)).to(_unit_dtype(sae.W_dec))
    # A cosine does not depend on norms, so random rows of any norm are the control. They have a seed of their own,
    # since SAEs may have started from rows that were drawn with the same small number.
    generator = torch.Generator().manual_seed(stable_number("random rows", seed))
    random = _unit(torch.randn(other.shape, generator=generator, dtype=one.dtype).to(one.device))
    some = torch.randperm(len(one), generator=generator)[:_CHANCE].to(one.device)
    forth, back = _largest(one, other)
    chance, chance_back = _largest(one[some], random)[0], _largest(random[:_CHANCE], one)[0]
    return Stability(*map(_partners, (forth, back, chance, chance_back)))


def nearest_others(rows: Tensor) -> Tensor:  # [F, C] -> [F]
    """Each row's largest cosine to another row, float32 (float64 of float64); 0 for rows of zeros, -1 without another.

    Each tile is computed once and serves both its rows and its columns.
    """
    unit = _unit(rows)
    found = unit.new_full((len(unit),), -1.0)
    for start in range(0, len(unit), _TILE):
        mine = slice(start, start + _TILE)
        for other in range(start, len(unit), _TILE):
            cosines = unit[mine] @ unit[other : other + _TILE].t()
            if other == start:
                cosines.fill_diagonal_(-1.0)
            found[mine] = torch.maximum(found[mine], cosines.amax(1))
            found[other : other + _TILE] = torch.maximum(found[other : other + _TILE], cosines.amax(0))
    return found.clamp(max=1.0)


def cosine_histogram(cosines: Tensor) -> Histogram:
    """In steps of 0.05 from -1 to 1."""
    return histogram(cosines, _EDGES)


def _largest(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:  # [F, C], [G, C] -> [F], [G]
    """The largest cosine of each row to rows of the other matrix, both ways."""
    forth, back = one.new_full((len(one),), -1.0), one.new_full((len(other),), -1.0)
    for i in range(0, len(one), _TILE):
        for j in range(0, len(other), _TILE):
            cosines = one[i : i + _TILE] @ other[j : j + _TILE].t()
            forth[i : i + _TILE] = torch.maximum(forth[i : i + _TILE], cosines.amax(1))
            back[j : j + _TILE] = torch.maximum(back[j : j + _TILE], cosines.amax(0))
    return forth.clamp(max=1.0), back.clamp(max=1.0)


def _partners(cosines: Tensor) -> Partners:
    matched = float((cosines > MATCH).double().mean())
    return Partners(matched, float(cosines.double().mean()), cosine_histogram(cosines))


def _unit_dtype(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def _unit(rows: Tensor) -> Tensor:  # [F, C]
    """Rows of length 1; a row of zeros stays one, whose cosines are 0."""
    exact = rows.to(_unit_dtype(rows))
    norms = exact.norm(dim=1, keepdim=True)
    return exact / torch.where(norms == 0, torch.ones_like(norms), norms)
