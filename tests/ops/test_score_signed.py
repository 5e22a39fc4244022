"""Score of top-k codes without a relu ("topk_signed"): the k largest pre-activations count, also where negative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from explicit_score import make_sae
from torch import Tensor

from fga_fast import ops
from fga_fast.ops.score import codes_of
from fga_fast.sae import SparseAutoencoder


def signed_sae(width: int = 12, features: int = 70, **more: Any) -> SparseAutoencoder:
    return make_sae("topk_signed", width, features, **more)


def contributions(x: Tensor, g: Tensor, sae: SparseAutoencoder, k: int) -> Tensor:
    """[B, P, F], densely: a stable sort gives ties to the lowest feature."""
    z = x @ sae.W_enc + sae.bias
    chosen = z.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    codes = torch.zeros_like(z).scatter(-1, chosen, z.gather(-1, chosen))
    return codes * (g @ sae.W_dec.t())


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("shift", (-8.0, -1.0, 0.0, 8.0))
@pytest.mark.parametrize("k", (1, 5, 69, 70))
def test_scores(k: int, shift: float, dtype: torch.dtype) -> None:
    """At shift -8 every pre-activation is negative, and the k nearest to zero count."""
    x, g = torch.randn(2, 2, 150, 12, dtype=dtype).unbind(0)
    sae = signed_sae(k=k, shift=shift, dtype=dtype)
    want = contributions(x, g, sae, k).sum(-1)
    rtol, atol = (1e-4, 1e-3) if dtype == torch.float32 else (1e-10, 1e-9)
    torch.testing.assert_close(ops.score(x, g, sae).scores, want, rtol=rtol, atol=atol)


def test_dictionary_of_several_tiles_and_the_strongest_features() -> None:
    x, g = torch.randn(2, 1, 9, 8, dtype=torch.float64).unbind(0)
    sae = signed_sae(8, 5000, k=64, shift=-5.0)
    dense = contributions(x, g, sae, 64)
    got = ops.score(x, g, sae, top_features=6)
    torch.testing.assert_close(got.scores, dense.sum(-1), rtol=1e-10, atol=1e-9)
    for index, value, of in (
        (got.patch_index, got.patch_contribution, dense),
        (got.image_index, got.image_contribution, dense.sum(1)),
    ):
        assert torch.equal(index, of.abs().sort(dim=-1, descending=True, stable=True).indices[..., :6])
        torch.testing.assert_close(value, of.gather(-1, index), rtol=1e-10, atol=1e-9)


def test_relu_is_what_makes_the_difference() -> None:
    x, g = torch.randn(2, 1, 9, 8, dtype=torch.float64).unbind(0)
    sae = signed_sae(8, shift=-20.0)
    assert bool((ops.score(x, g, sae).scores != 0).all())
    sae.activation = "topk"
    assert bool((ops.score(x, g, sae).scores == 0).all())


def test_ties_below_zero_go_to_the_lowest_feature() -> None:
    features, width = 40, 4
    sae = SparseAutoencoder(
        -torch.ones(width, features),
        None,
        torch.eye(features)[:, :width].contiguous(),
        torch.zeros(width),
        "topk_signed",
        k=3,
    )
    x, g = torch.ones(1, 20, width), torch.tensor([1.0, 10.0, 100.0, 1000.0]).expand(1, 20, width)
    assert ops.score(x, g, sae).scores.tolist() == [[-4 * 111.0] * 20]


def test_activation_only_sums_signed_codes() -> None:
    x = torch.randn(1, 7, 12, dtype=torch.float64)
    sae = signed_sae(shift=-8.0)
    want = (x @ sae.W_enc + sae.bias).sort(dim=-1, descending=True).values[..., :5].sum(-1)
    torch.testing.assert_close(ops.score(x, x, sae, "activation_only").scores, want)


def test_what_is_not_finite_is_named_in_its_patch() -> None:
    x = torch.randn(1, 4, 12, dtype=torch.float64)
    x[0, 2, 3] = float("nan")
    assert ops.score(x, torch.ones_like(x), signed_sae()).scores.isnan().tolist() == [[False, False, True, False]]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_sixteen_bits(dtype: torch.dtype) -> None:
    x, g = torch.randn(2, 2, 30, 12, dtype=torch.float64).to(dtype).unbind(0)
    sae = signed_sae(dtype=torch.float32, shift=-3.0)  # float32 weights: the choice is that of exact arithmetic
    want = contributions(x.double(), g.double(), sae.double(), 5).sum(-1)
    assert float((ops.score(x, g, sae.float()).scores - want).norm() / want.norm()) < 1e-5


def test_opcheck() -> None:
    x = torch.randn(2, 4, 12)
    sae = signed_sae(dtype=torch.float32)
    arguments = (
        x, x, None, sae.W_enc.t(), sae.bias, sae.W_dec, None, None, None, None,
        None, None, *codes_of("topk_signed", None, "combined"), 3, 2,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fga_fast.score, arguments)


def test_k_is_needed() -> None:
    x = torch.randn(1, 4, 12, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="k must be at least 1"):
        torch.ops.fga_fast.score(
            x, x, None, *(signed_sae().W_enc.t(), signed_sae().bias, signed_sae().W_dec), None, None, None, None,
            None, None, *codes_of("topk_signed", None, "combined"), 0, 0,
        )  # fmt: skip
