"""self_check: right numbers, and numbers that tell a wrong layer or normalisation from the right one."""

from __future__ import annotations

import math

import pytest
import torch
from formats_case import draw

from fga_fast.sae import SelfCheck, SparseAutoencoder

C, F, K = 8, 32, 2


def world() -> tuple[SparseAutoencoder, torch.Tensor]:
    """An SAE of tied unit rows with a mean, and tokens made of K of its first 24 features each."""
    rows = draw(F, C, seed=1, dtype=torch.float32)
    rows = rows / rows.norm(dim=1, keepdim=True)
    mean = draw(C, seed=2, dtype=torch.float32) * 3
    generator = torch.Generator().manual_seed(3)
    x = torch.stack([(rows[torch.randperm(24, generator=generator)[:K]] * 4).sum(0) for _ in range(600)])
    never = torch.cat([torch.zeros(F - 4), torch.full((4,), -99.0)])  # the last four features are never chosen
    return SparseAutoencoder(rows.t(), never, rows, mean, "topk", k=K), x + mean


def test_numbers_by_hand() -> None:
    eye = torch.eye(2, 4)
    sae = SparseAutoencoder(eye, torch.tensor([0.0, 0.0, 0.0, -9.0]), eye.t(), torch.zeros(2), "relu")
    x = torch.tensor([[1.0, -1.0], [3.0, 1.0]])
    found = sae.self_check(x)
    # codes [1, 0], [3, 1]; reconstruction [1, 0], [3, 1]; residual 1 of a variance of 4; features 2 and 3 are never on
    assert found == SelfCheck(explained_variance=0.75, l0=1.5, dead=0.5, tokens=2)


@pytest.mark.parametrize("normalize", [None, "layer_norm", "constant_norm"])
def test_a_perfect_reconstruction(normalize: str | None) -> None:
    # Features +e_i and -e_i reconstruct every token exactly, one active feature a nonzero coordinate.
    signs = torch.cat([torch.eye(C), -torch.eye(C)], dim=1).double()
    sae = SparseAutoencoder(signs, None, signs.t(), torch.zeros(C).double(), normalize=normalize)
    found = sae.self_check(draw(6, C, seed=4) * 2 + 0.5)
    assert found.explained_variance == pytest.approx(1.0, abs=1e-8) and found.l0 == C


def test_negative_codes_are_active() -> None:
    eye = torch.eye(3)
    sae = SparseAutoencoder(eye, None, eye, torch.zeros(3), "topk_signed", k=2)
    found = sae.self_check(torch.tensor([[-1.0, -2.0, -3.0], [-4.0, 1.0, 0.5]]))
    assert (found.l0, found.dead) == (2.0, 0.0)


@pytest.mark.parametrize("shape", [(600, C), (3, 200, C), (2, 3, 100, C)])
def test_any_shape_and_more_tokens_than_one_chunk(shape: tuple[int, ...]) -> None:
    sae, x = world()
    found = sae.self_check(x.reshape(shape))
    assert found.tokens == 600 and found.l0 == K
    exact, mean = x.double(), x.double().mean(0)
    expected = 1 - ((exact - sae(x)) ** 2).sum() / ((exact - mean) ** 2).sum()
    assert found.explained_variance == pytest.approx(float(expected), abs=1e-12)
    assert found.dead == 1 - int((sae.encode(x) != 0).any(0).sum()) / F >= 4 / F


def test_a_wrong_layer_or_normalisation_shows() -> None:
    sae, x = world()
    right = sae.self_check(x).explained_variance
    other_mean = sae.self_check(x + 5.0).explained_variance  # another layer's mean
    scaled = sae.self_check(x * 0.05).explained_variance
    normed = SparseAutoencoder(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, "topk", k=K, normalize="layer_norm")
    assert right > 0.6
    assert max(other_mean, scaled, normed.self_check(x).explained_variance) < 0.2


def test_what_it_cannot_take() -> None:
    sae, x = world()
    for flat in (x[:0], x[:1], x[:1].expand(5, C)):
        with pytest.raises(ValueError, match="x: expected at least two tokens that differ"):
            sae.self_check(flat)
    with pytest.raises(TypeError, match=r"x: expected dtype torch\.float32"):
        sae.self_check(x.double())
    with pytest.raises(ValueError, match=r"x: expected shape \[\.\.\., 8\], got \[600, 7\]"):
        sae.self_check(x[:, :7])


def test_nan_is_not_hidden() -> None:
    sae, x = world()
    x[3, 2] = float("nan")
    assert math.isnan(sae.self_check(x).explained_variance)
