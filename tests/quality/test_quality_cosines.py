"""Cosines of decoder rows, and what two SAEs share, against all pairs at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from own_vit import own_vit
from quality_case import draw, items, nearest, random_sae

from fga_fast.dataset.items import stable_number
from fga_fast.quality import cosines
from fga_fast.quality.cosines import nearest_others, stability
from fga_fast.quality.histogram import histogram
from fga_fast.quality.run import quality
from fga_fast.sae import SparseAutoencoder


def sae_of(rows: torch.Tensor) -> SparseAutoencoder:  # [F, C]
    return SparseAutoencoder(torch.zeros_like(rows).t(), None, rows, torch.zeros(rows.shape[1]).to(rows))


@pytest.mark.parametrize("tile", (1, 3, 7, 100))
def test_nearest_others(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr(cosines, "_TILE", tile)
    for features in (2, 7, 20):
        rows = draw(features, 4, seed=features)
        np.testing.assert_allclose(nearest_others(rows), nearest(rows), rtol=1e-12)


def test_copies_zeros_and_a_single_row() -> None:
    rows = torch.tensor([[1.0, 0], [3, 0], [0, 0], [-1, 0]])
    assert nearest_others(rows).tolist() == [1, 1, 0, 0]
    assert nearest_others(rows[:1]).tolist() == [-1]
    assert nearest_others(rows.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("tile", (2, 5, 100))
def test_stability_against_all_pairs(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr(cosines, "_TILE", tile)
    one, other = draw(9, 3, seed=1), draw(12, 3, seed=2)
    found = stability(sae_of(one), sae_of(other), seed=4)
    random = draw(12, 3, seed=stable_number("random rows", 4))
    for second, forth, back in ((other, found.forth, found.back), (random, found.chance, found.chance_back)):
        pairs = torch.nn.functional.cosine_similarity(one[:, None], second[None], dim=2).numpy()
        for partners, largest in ((forth, pairs.max(1)), (back, pairs.max(0))):
            assert partners.mean == pytest.approx(largest.mean(), abs=1e-12)
            assert partners.matched == (largest > 0.9).mean()
            assert list(partners.cosines.counts) == np.histogram(largest, partners.cosines.edges)[0].tolist()
    assert 0 < found.forth.matched < 1 and found.forth.matched != found.back.matched


def test_the_control_takes_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = sae_of(draw(300, 4, seed=1)), sae_of(draw(200, 4, seed=2))
    whole = stability(one, other)
    monkeypatch.setattr(cosines, "_CHANCE", 100)
    some = stability(one, other)
    assert (some.forth, some.back) == (whole.forth, whole.back)
    assert sum(some.chance.cosines.counts) == sum(some.chance_back.cosines.counts) == 100
    assert some.chance.mean == pytest.approx(whole.chance.mean, abs=0.02)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_a_permutation_of_its_own_shares_everything(dtype: torch.dtype) -> None:
    rows = draw(200, 16).to(dtype)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    scaled = rows[order] * torch.linspace(0.1, 9, 200)[:, None].to(dtype)  # norms do not count
    found = stability(sae_of(rows), sae_of(scaled))
    for partners in (found.forth, found.back):
        assert partners.matched == 1 and partners.mean == pytest.approx(1, abs=1e-6)
    assert found.chance.matched == found.chance_back.matched == 0 and found.chance.mean < 0.75
    assert stability(sae_of(rows), sae_of(-scaled)).forth.matched == 0
    assert stability(sae_of(rows), sae_of(scaled), seed=1).chance != found.chance


def test_random_rows_take_no_more_memory_than_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[torch.dtype] = []
    randn = torch.randn

    def watched(*shape: Any, **settings: Any) -> torch.Tensor:
        found = randn(*shape, **settings)
        drawn.append(found.dtype)
        return found

    one, other = sae_of(draw(9, 3).float()), sae_of(draw(9, 3, seed=1).float())
    monkeypatch.setattr(torch, "randn", watched)
    stability(one, other)
    assert drawn == [torch.float32]


def test_a_second_sae_beside_the_first() -> None:
    model = own_vit()
    saes: Any = {1: random_sae(), 0: random_sae(seed=7)}
    found = quality(model, saes, items(2), second={1: random_sae()}, layout=model.layout(), progress=False)
    assert found[0].stability is None
    beside = found[1].stability
    assert beside is not None and beside.forth.matched == beside.back.matched == 1
    with pytest.raises(ValueError, match=r"second: expected an SAE of the width 16, got 3"):
        stability(random_sae(), sae_of(draw(4, 3)))


def test_histogram_takes_values_on_edges_as_it_says() -> None:
    edges = [place / 20 for place in range(-20, 21)]
    values = [-1.0, 0.0, 0.05, 0.9, 1.0, *draw(300).clamp(-1, 1).tolist()]
    found = histogram(torch.tensor(values, dtype=torch.float64), edges)
    assert list(found.counts) == np.histogram(values, edges)[0].tolist() and sum(found.counts) == 305
    assert histogram(torch.tensor([]), [0, 1, 2]).counts == (0, 0)
