"""The strongest SAE features of an explanation, as lists to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fga_fast.sae.features import TopFeatures
from fga_fast.sae.notes import Note


def card_url(page: str, block: int, feature: int) -> str:
    """Where a feature's card is on the page that `cards.run.feature_cards` wrote; "" for the page itself."""
    return f"{page}#block-{block}-feature-{feature}"


class FeatureContribution(NamedTuple):
    """One SAE feature and what it contributes to the score."""

    feature: int
    contribution: float


def ranked(
    features: Mapping[int, TopFeatures], grid: tuple[int, int], block: int, k: int | None, patch: tuple[int, int] | None
) -> list[Any]:
    """Lists of `FeatureContribution`, largest in magnitude first; see `Explanation.top_features`."""
    if block not in features:
        recorded = f"only for blocks {sorted(features)}" if features else "for no block"
        raise ValueError(
            f"block: features were recorded {recorded}, got {block}; "
            f"construct Explainer(..., saes={{{block}: sae}}, top_features=k)"
        )
    top = features[block]
    recorded_k = top.image_index.shape[-1]
    if k is not None and not 0 < k <= recorded_k:
        raise ValueError(f"k: expected 1 to {recorded_k}, got {k}; construct Explainer(..., top_features=k) for more")
    index, contribution = top.image_index, top.image_contribution  # [B, (K,) k]
    if patch is not None:
        (row, column), (rows, columns) = patch, grid
        if not (0 <= row < rows and 0 <= column < columns):
            raise ValueError(f"patch: expected a (row, column) inside the {rows}x{columns} grid, got {patch}")
        index = top.patch_index[..., row * columns + column, :]
        contribution = top.patch_contribution[..., row * columns + column, :]
    return _sorted(index.tolist(), contribution.tolist(), k)


def strongest(
    features: Mapping[int, TopFeatures], notes: Mapping[tuple[int, int], Note]
) -> dict[int, list[str]]:  # fmt: skip
    """Block -> the name of the strongest feature of each image and target, or its number; "" where none contributes."""
    found = {}
    for block, top in features.items():
        index, size = top.image_index.flatten(0, -2), top.image_contribution.flatten(0, -2).abs()  # [M, k]
        first = index.gather(1, size.where(index >= 0, -1).argmax(1, keepdim=True)).flatten().tolist()
        found[block] = [_called(block, feature, notes) for feature in first]
    return found


def _called(block: int, feature: int, notes: Mapping[tuple[int, int], Note]) -> str:
    if feature < 0:  # none
        return ""
    return notes[block, feature].name if (block, feature) in notes else f"feature {feature}"


def _sorted(index: list[Any], contribution: list[Any], k: int | None) -> list[Any]:
    if index and isinstance(index[0], list):
        return [_sorted(i, c, k) for i, c in zip(index, contribution, strict=True)]
    pairs = [FeatureContribution(i, c) for i, c in zip(index, contribution, strict=True) if i >= 0]  # -1: none
    return sorted(pairs, key=lambda pair: -abs(pair.contribution))[:k]
