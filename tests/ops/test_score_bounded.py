"""The bounded encoder of the native score: it leaves out what is off for certain, and never anything else.

Each case runs twice: with the bounds, and with bounds that rule nothing out, so that every feature of every patch gets
its float32 product. All results must be the same bits.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from statistics import NormalDist

import pytest
import torch
from explicit_score import sample
from torch import Tensor

from fga_fast import SparseAutoencoder, ops
from fga_fast.ops.round_encoder import round_encoder
from fga_fast.ops.score import codes_of

WIDTH = 48
FEATURES = 2048  # one tile for up to 128 patches: after a tile of which much may be on, the kernel takes dense ones
LENGTH, ERROR = 1, 2  # rows of the limits


# FGA_FAST_BOUND is 1 in tests; see conftest.py.
USED = round_encoder(torch.zeros(1, 1), only_if_used=True).encoder.numel() > 0


def scored(
    x: Tensor, g: Tensor, sae: SparseAutoencoder, change: Callable[[Tensor], Tensor] | None, top: int = 6
) -> ops.Score:
    """The op on a rounded encoder with changed limits; None: without one."""
    rounded: tuple[Tensor | None, Tensor | None] = (None, None)
    if change is not None:
        encoder, limits = round_encoder(sae.W_enc.t())
        rounded = (encoder, change(limits.clone()))
    return ops.Score(
        *torch.ops.fga_fast.score(
            x, g, None, sae.W_enc.t(), sae.bias, sae.W_dec, sae.theta, sae.gate_scale, sae.mag_bias, None, *rounded,
            *codes_of(sae.activation, sae.normalize, "combined"), sae.k or 0, top,
        )
    )  # fmt: skip


def as_they_are(limits: Tensor) -> Tensor:
    return limits


def ruling_nothing_out(limits: Tensor) -> Tensor:
    limits[ERROR] = math.inf
    return limits


def too_narrow(limits: Tensor) -> Tensor:
    """What a mistake in the bounds would do: features of some patches get lost."""
    limits[LENGTH:] *= -40
    return limits


def same_bits(one: ops.Score, other: ops.Score) -> bool:
    return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(one, other, strict=True))


def dictionary(
    weights: Tensor, activation: str = "relu", share: float = 0.05, k: int | None = None  # [F, C]
) -> SparseAutoencoder:  # fmt: skip
    """Thresholds such that on standard normal x the share of active features is as given."""
    features, width = weights.shape
    at = (weights.double().norm(dim=1) * NormalDist().inv_cdf(1 - share)).float()
    has_threshold = activation in ("jumprelu", "batch_topk")
    gated = {"b_gate": -at, "r_mag": torch.randn(features), "b_mag": torch.randn(features)}
    return SparseAutoencoder(
        weights.t(), None if activation == "gated" or has_threshold or k else -at, torch.randn(features, width),
        torch.zeros(width), activation, k, at if has_threshold else None, **(gated if activation == "gated" else {}),
    )  # fmt: skip


def loud(x: Tensor) -> Tensor:
    return x * torch.where(torch.arange(x.shape[-1]) % 16 == 3, 40.0, 1.0)


def of_all_sizes(x: Tensor) -> Tensor:
    return x * 10 ** torch.empty(*x.shape[:-1], 1).uniform_(-20, 20)


def constant(x: Tensor) -> Tensor:
    return x[..., :1].expand_as(x).contiguous()


def partly_zero(x: Tensor) -> Tensor:
    return x * (torch.rand(*x.shape[:-1], 1) < 0.5)


ROWS = [lambda x: x, loud, of_all_sizes, constant, partly_zero, lambda x: 1e-40 * x, lambda x: x.round()]


@pytest.mark.parametrize("of_w", range(len(ROWS)))
@pytest.mark.parametrize("of_x", range(len(ROWS)))
def test_rows_of_all_kinds(of_x: int, of_w: int) -> None:
    x, g = sample(2, 61, width=WIDTH, dtype=torch.float32)
    sae = dictionary(ROWS[of_w](torch.randn(FEATURES, WIDTH)))
    x = ROWS[of_x](x)
    assert same_bits(scored(x, g, sae, as_they_are), scored(x, g, sae, ruling_nothing_out))


@pytest.mark.parametrize("width", (1, 2, 7, 45, 200))
@pytest.mark.parametrize("kind", (0, 1, 2))
def test_widths(kind: int, width: int) -> None:
    x, g = sample(2, 61, width=width, dtype=torch.float32)
    sae = dictionary(ROWS[kind](torch.randn(FEATURES, width)))
    found = scored(x, g, sae, as_they_are)
    assert same_bits(found, scored(x, g, sae, ruling_nothing_out))
    if kind < 2:  # else scores reach 1e15
        torch.testing.assert_close(found.scores, scored(x, g, sae, None).scores, rtol=1e-3, atol=1e-2 * width)


@pytest.mark.parametrize("activation", ("relu", "topk"))
def test_more_threads_than_ranges_of_patches(activation: str) -> None:
    """They share the features of a range; no number depends on that. (The first tile of topk is torch's product.)"""
    x, g = sample(1, 40, width=WIDTH, dtype=torch.float32)
    sae = dictionary(torch.randn(3 * FEATURES - 77, WIDTH), activation, k=9 if activation == "topk" else None)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(scored(x, g, sae, as_they_are))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert activation == "topk" or same_bits(found[0], other)
        torch.testing.assert_close(found[0].scores, other.scores, rtol=1e-4, atol=1e-3)


def test_a_hundred_million_pre_activations() -> None:
    """128 patches and 2,048 features at a time."""
    for number in range(384):
        x, g = torch.randn(2, 1, 128, WIDTH)
        weights = torch.randn(FEATURES, WIDTH)
        x, weights = (loud(x), weights) if number % 3 == 1 else (x, loud(weights)) if number % 3 == 2 else (x, weights)
        sae = dictionary(weights)
        assert same_bits(scored(x, g, sae, as_they_are), scored(x, g, sae, ruling_nothing_out))


@pytest.mark.parametrize("activation", ("relu", "jumprelu", "batch_topk", "gated", "topk", "topk_signed"))
def test_activations(activation: str) -> None:
    """The choice of k begins with a dense tile, so that its dictionary has two."""
    x, g = sample(2, 50, width=WIDTH, dtype=torch.float32)
    k = 9 if activation.startswith("topk") else None
    sae = dictionary(torch.randn((2 if k else 1) * FEATURES - 5, WIDTH), activation, k=k)
    found = scored(x, g, sae, as_they_are)
    assert same_bits(found, scored(x, g, sae, ruling_nothing_out))
    want = scored(x, g, sae, None)
    torch.testing.assert_close(found.scores, want.scores, rtol=1e-4, atol=1e-4)
    assert float((found.patch_index == want.patch_index).float().mean()) > 0.999  # rounding at the threshold


@pytest.mark.parametrize("step", (-1, 0, 1))
def test_thresholds_a_rounding_away(step: int) -> None:
    """Whole numbers, whose products are exact: each feature's threshold is its value at one of the patches."""
    x = torch.randint(-9, 10, (1, 64, WIDTH)).float()
    weights = torch.randint(-9, 10, (FEATURES, WIDTH)).float()
    at = (x[0] @ weights.t())[torch.arange(FEATURES) % 64, torch.arange(FEATURES)]  # [F]
    for _ in range(abs(step)):
        at = torch.nextafter(at, torch.full_like(at, math.copysign(math.inf, step)))
    sae = SparseAutoencoder(weights.t(), None, torch.eye(FEATURES, WIDTH), torch.zeros(WIDTH), "jumprelu", None, at)
    found, want = (scored(x, torch.ones_like(x), sae, limits) for limits in (as_they_are, None))
    assert same_bits(found, want)
    on = (sae.encode(x)[0, torch.arange(FEATURES) % 64, torch.arange(FEATURES)] > 0)[at > 0]
    assert bool((on == (step < 0)).all())  # as the reference has it too


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf, 3e38))
def test_values_that_are_not_finite_or_overflow(bad: float) -> None:
    x, g = sample(2, 40, width=WIDTH, dtype=torch.float32)
    x[0, 3, 5] = x[1, 0] = bad
    sae = dictionary(torch.randn(FEATURES, WIDTH))
    found, want = scored(x, g, sae, as_they_are), scored(x, g, sae, None)
    if not math.isfinite(bad):  # else it depends on the order of sums what overflows
        assert torch.equal(found.scores.isnan(), want.scores.isnan())
    assert same_bits(found, scored(x, g, sae, ruling_nothing_out))


@pytest.mark.parametrize("share", (1e-9, 0.5, 1 - 1e-7))
def test_all_off_half_and_all_on(share: float) -> None:
    """Of many tiles: most are dense where much is on, and the result is the same."""
    x, g = sample(1, 40, width=WIDTH, dtype=torch.float32)
    sae = dictionary(torch.randn(12 * FEATURES, WIDTH), share=share)
    found, want = scored(x, g, sae, as_they_are), scored(x, g, sae, None)
    torch.testing.assert_close(found.scores, want.scores, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(not USED, reason="this processor's kernels take no bounds")
def test_narrower_bounds_would_be_noticed() -> None:
    x, g = sample(2, 61, width=WIDTH, dtype=torch.float32)
    sae = dictionary(torch.randn(FEATURES, WIDTH))
    assert not same_bits(scored(x, g, sae, too_narrow), scored(x, g, sae, ruling_nothing_out))


def test_rounded_rows_are_as_near_as_they_say() -> None:
    weights = torch.cat([rows(torch.randn(40, WIDTH - 1)) for rows in ROWS])  # an odd width
    encoder, limits = round_encoder(weights)
    features = len(weights)
    whole = encoder.transpose(1, 2).flatten(2).flatten(0, 1)[:features].double()  # [F, C + 1]
    assert int(whole[:, -1].abs().max()) == 0
    scale, length, error = limits[:, :features].double()
    there = whole[:, :-1] * scale[:, None]
    fits = error.isfinite()
    assert fits.sum() > 0.5 * features
    assert bool(((weights.double() - there).norm(dim=1) <= error)[fits].all())
    assert bool(((weights.double().norm(dim=1) <= length) & (there.norm(dim=1) <= length))[fits].all())
    assert bool((whole.norm(dim=1) < 2**15.5).all())
    assert bool((error[fits] <= 3e-3 * length[fits]).all())
    lengths = weights.double().norm(dim=1)
    assert bool(((lengths > 1e18) | ((lengths > 0) & (lengths < 1e-12)))[~fits].all())


def test_the_sae_keeps_its_rounded_encoder_while_it_fits() -> None:
    x, g = sample(1, 5, width=WIDTH, dtype=torch.float32)
    sae = dictionary(torch.randn(64, WIDTH))
    assert sae.encoder is None
    if not USED:
        pytest.skip("this processor's kernels take no bounds")
    ops.score(x, g, sae)
    kept = sae.encoder
    ops.score(x, g, sae)
    assert kept is not None and sae.encoder is kept
    assert "encoder" not in sae.state_dict()
    assert copy.deepcopy(sae).encoder is None and pickle.loads(pickle.dumps(sae)).encoder is None
    assert sae.double().encoder is None
    ops.score(x.double(), g.double(), sae)
    assert sae.encoder is None  # float64 takes the dense product
    again = sae.float()
    again.load_state_dict({**again.state_dict(), "_W_enc_t": 2 * again._W_enc_t})
    ops.score(x, g, again)
    assert again.encoder is not None and again.limits is not None
    torch.testing.assert_close(again.limits[0, :64], 2 * round_encoder(again.W_enc.t() / 2)[1][0, :64])


def test_the_setting_is_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    x, g = sample(1, 50, width=WIDTH, dtype=torch.float32)
    sae = dictionary(torch.randn(64, WIDTH))
    monkeypatch.setenv("FGA_FAST_BOUND", "0")
    dense = ops.score(x, g, sae)
    assert sae.encoder is None
    assert same_bits(dense, scored(x, g, sae, None, top=0))
    monkeypatch.setenv("FGA_FAST_BOUND", "1")
    ops.score(x, g, sae)
    assert (sae.encoder is not None) == USED


def test_writing_into_the_encoder_makes_new_bounds() -> None:
    x, g = sample(1, 50, width=WIDTH, dtype=torch.float32)
    sae = dictionary(torch.randn(64, WIDTH))
    ops.score(x, g, sae)
    sae.W_enc[:, ::2] *= -1
    found = ops.score(x, g, sae, top_features=6)
    torch.testing.assert_close(found.scores, scored(x, g, sae, None).scores, rtol=1e-4, atol=1e-3)
    assert same_bits(found, scored(x, g, sae, ruling_nothing_out))


def test_a_copy_makes_its_own_bounds() -> None:
    x, g = sample(1, 50, width=WIDTH, dtype=torch.float32)
    sae = dictionary(torch.randn(64, WIDTH))
    sae.W_enc.mul_(1.0)
    ops.score(x, g, sae)
    sae.W_enc.neg_()
    for other in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae)), copy.copy(sae)):
        found = ops.score(x, g, other, top_features=6)
        torch.testing.assert_close(found.scores, scored(x, g, sae, None).scores, rtol=1e-4, atol=1e-3)
    assert not USED or sae.encoder is not None  # the original keeps its own


def test_an_encoder_too_wide_for_bounds_is_dense() -> None:
    width = 65_537
    weights = torch.randn(3, width) / width**0.5
    sae = SparseAutoencoder(weights.t(), None, torch.ones(3, width), torch.zeros(width))
    x = torch.randn(1, 2, width)
    torch.testing.assert_close(ops.score(x, torch.ones_like(x), sae).scores, sae.encode(x).sum(-1) * width)


def test_bad_arguments_are_named() -> None:
    x, g = sample(1, 5, width=WIDTH, dtype=torch.float32)
    sae = dictionary(torch.randn(64, WIDTH))
    encoder, limits = round_encoder(sae.W_enc.t())
    for rounded, message in (
        ((encoder, None), "encoder and limits belong together"),
        ((encoder[:1], limits), r"encoder must have shape \[4, 24, 16, 2\], got \[1, 24, 16, 2\]"),
        ((encoder.float(), limits), "encoder must be int16"),
        ((encoder, limits[:2]), r"limits must have shape \[3, 64\], got \[2, 64\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fga_fast.score(
                x, g, None, sae.W_enc.t(), sae.bias, sae.W_dec, None, None, None, None, *rounded,
                *codes_of("relu", None, "combined"), 0, 0,
            )  # fmt: skip
    for weights, message in (
        (sae.W_enc.t().double(), "W_enc_t must be float32, got float64"),
        (sae.bias, r"W_enc_t must be \[F, C\]"),
        (torch.zeros(1, 65537), "W_enc_t may be up to 65536 wide, got 65537"),
    ):
        with pytest.raises(RuntimeError, match=message):
            round_encoder(weights)
