"""Feature score against the reference: activations, modes, both routes of the kernel, top features, shared images."""

from __future__ import annotations

import pytest
import torch
from explicit_attention import relative
from explicit_score import ACTIVATIONS, check_top, copy_of, make_sae, sample, truth
from hypothesis import given, settings
from hypothesis import strategies as st

from fga_fast import ops, reference
from fga_fast.ops.score import codes_of
from fga_fast.sae import SparseAutoencoder

PATCHES = (1, 2, 17, 50, 197, 201, 257, 577, 1025)
EXACT = {torch.float64: 1e-11, torch.float32: 1e-4}


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("patches", PATCHES)
def test_patch_counts(patches: int, dtype: torch.dtype) -> None:
    x, g = sample(2, patches, dtype=dtype)
    sae = make_sae("relu", dtype=dtype)
    assert relative(ops.score(x, g, sae).scores, truth(x, g, sae)) < EXACT[dtype]


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("normalize", (None, "layer_norm", "constant_norm"))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, normalize: str | None, dtype: torch.dtype) -> None:
    x, g = sample(3, 31, dtype=dtype)
    sae = make_sae(activation, normalize=normalize, dtype=dtype)
    assert relative(ops.score(x, g, sae).scores, truth(x, g, sae)) < EXACT[dtype]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mode", ops.MODES)
def test_modes(mode: str, activation: str) -> None:
    x, g = sample(2, 20)
    sae = make_sae(activation)
    permutation = torch.randperm(70) if mode == "shuffled" else None
    got = ops.score(x, g, sae, mode, permutation=permutation).scores
    assert relative(got, truth(x, g, sae, mode, permutation=permutation)) < 1e-11


@pytest.mark.parametrize("shift", (-4.0, -1.0, 0.0, 1.0, 6.0))
@pytest.mark.parametrize("mode", ("combined", "shuffled", "activation_only"))
def test_dense_and_gathered_routes_agree_with_the_reference(shift: float, mode: str) -> None:
    """From hardly any feature active, where decoder rows are gathered, to nearly all, where a second product runs."""
    x, g = sample(2, 150, width=40)
    sae = make_sae("relu", width=40, features=300, shift=shift)
    permutation = torch.randperm(300) if mode == "shuffled" else None
    got = ops.score(x, g, sae, mode, permutation=permutation, top_features=4)
    assert relative(got.scores, truth(x, g, sae, mode, permutation=permutation)) < 1e-10
    check_top(got, x, g, sae, mode, permutation=permutation)


def test_dictionary_of_several_tiles() -> None:
    x, g = sample(1, 9, width=8, dtype=torch.float32)
    for activation in ("relu", "topk"):
        sae = make_sae(activation, width=8, features=5000, dtype=torch.float32, k=64)
        assert relative(ops.score(x, g, sae).scores, truth(x, g, sae)) < 1e-4


@pytest.mark.parametrize("k", (1, 2, 69, 70))
def test_topk_from_one_to_all(k: int) -> None:
    x, g = sample(2, 13)
    sae = make_sae("topk", k=k)
    assert relative(ops.score(x, g, sae).scores, truth(x, g, sae)) < 1e-11


@pytest.mark.parametrize("features", (2048, 2148, 5000))
def test_strongest_of_an_image_with_several_targets_and_tiles(features: int) -> None:
    """The last tile is shorter than the others; its features must not be mistaken for those of the tile before."""
    x, g = sample(1, 9, width=8, rows=3)
    sae = make_sae("relu", width=8, features=features)
    sae.W_dec[-3:] *= 20
    image = torch.zeros(3, dtype=torch.int64)
    check_top(ops.score(x, g, sae, image=image, top_features=5), x, g, sae, image=image)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_finite_is_not_taken_for_inactive(activation: str) -> None:
    x, g = sample(2, 5)
    x = x.clone()
    x[1, 3, 2] = float("nan")
    scores = ops.score(x, g, make_sae(activation)).scores
    assert scores.isnan().nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize("normalize", ("layer_norm", "constant_norm"))
def test_a_token_of_zeros(normalize: str) -> None:
    x, g = sample(1, 4)
    x = x.clone()
    x[0, 2] = 0
    sae = make_sae("relu", normalize=normalize)
    assert relative(ops.score(x, g, sae).scores, truth(x, g, sae)) < 1e-11


@pytest.mark.parametrize("activation", ("relu", "topk"))
@pytest.mark.parametrize("row", (-1, 70, 10**12))
def test_a_permutation_that_points_outside_is_refused(row: int, activation: str) -> None:
    x, g = sample(1, 4)
    permutation = torch.arange(70)
    permutation[6] = row
    with pytest.raises(RuntimeError, match=rf"permutation\[6\] is {row}, expected 0 to 69"):
        ops.score(x, g, make_sae(activation), "shuffled", permutation=permutation)


def test_topk_ties_go_to_the_lowest_feature() -> None:
    """Every feature has the same pre-activation; decoder rows tell which were kept."""
    features, width = 40, 4
    sae = SparseAutoencoder(
        torch.ones(width, features), None, torch.eye(features)[:, :width].contiguous(), torch.zeros(width), "topk", k=3
    )
    x, g = torch.ones(1, 2, width), torch.tensor([1.0, 10.0, 100.0, 1000.0]).expand(1, 2, width)
    assert ops.score(x, g, sae).scores.tolist() == [[4 * 111.0, 4 * 111.0]]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("wide_sae", (False, True))
@pytest.mark.parametrize("activation", ("relu", "topk", "gated"))
def test_sixteen_bits_err_at_most_twice_what_plain_torch_does(
    activation: str, wide_sae: bool, dtype: torch.dtype
) -> None:
    x, g = sample(2, 60, width=64, dtype=dtype)
    sae = make_sae(activation, width=64, features=256, dtype=torch.float32, k=16)
    low = copy_of(sae).to(dtype)
    got = ops.score(x, g, sae if wide_sae else low).scores
    want = truth(x, g, sae if wide_sae else low)
    assert got.dtype == torch.float32
    assert relative(got, want) <= 2 * relative(reference.score(x, g, low, "combined"), want)


@settings(max_examples=40, deadline=None)
@given(
    images=st.integers(1, 3), patches=st.integers(1, 140), width=st.integers(2, 70), features=st.integers(1, 90),
    targets=st.integers(0, 4), activation=st.sampled_from(ACTIVATIONS), shift=st.sampled_from((-3.0, 0.0, 5.0)),
)  # fmt: skip
def test_any_shape(
    images: int, patches: int, width: int, features: int, targets: int, activation: str, shift: float
) -> None:
    sae = make_sae(activation, width, features, k=min(7, features), shift=shift)
    x, g = sample(images, patches, width, rows=targets)
    image, top = torch.randint(images, (targets,)), min(3, features)
    got = ops.score(x, g, sae, image=image, top_features=top)
    want = truth(x, g, sae, image=image)
    assert relative(got.scores, want) < 1e-9 or (got.scores - want).abs().max() < 1e-9
    if targets:
        check_top(got, x, g, sae, image=image)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_top_features(activation: str) -> None:
    x, g = sample(2, 30)
    sae = make_sae(activation, shift=-1.0)
    plain = ops.score(x, g, sae)
    got = ops.score(x, g, sae, top_features=9)
    assert torch.equal(got.scores, plain.scores)
    assert plain.patch_index.shape == (2, 30, 0)
    check_top(got, x, g, sae)


def test_top_features_of_equal_strength_come_in_order() -> None:
    sae = SparseAutoencoder(torch.ones(2, 6), None, torch.ones(6, 2), torch.zeros(2))
    got = ops.score(torch.ones(1, 3, 2), torch.ones(1, 3, 2), sae, top_features=4)
    assert got.patch_index.tolist() == [[[0, 1, 2, 3]] * 3]
    assert got.image_index.tolist() == [[0, 1, 2, 3]]
    assert got.image_contribution.tolist() == [[12.0] * 4]


@pytest.mark.parametrize("activation", ("relu", "topk"))
def test_several_targets_share_an_image(activation: str) -> None:
    image = torch.tensor([1, 0, 1, 1])
    sae = make_sae(activation, shift=-1.0)
    x, g = sample(2, 33, rows=4)
    shared = ops.score(x, g, sae, image=image, top_features=3)
    for m in range(4):
        alone = ops.score(x[image[m]][None], g[m][None], sae, top_features=3)
        for got, want in zip(shared, alone, strict=True):
            torch.testing.assert_close(got[m], want[0], rtol=1e-12, atol=1e-12)


def test_dead_dictionary_and_zero_gradient_score_zero() -> None:
    x, g = sample(1, 5)
    assert torch.equal(ops.score(x, g, make_sae("relu", shift=-1e6)).scores, torch.zeros(1, 5, dtype=torch.float64))
    got = ops.score(x, torch.zeros_like(g), make_sae("relu"), top_features=2)
    assert torch.equal(got.scores, torch.zeros(1, 5, dtype=torch.float64))
    assert bool((got.patch_index == -1).all())


def test_no_images_and_no_patches() -> None:
    sae = make_sae("relu")
    assert ops.score(*sample(0, 5), sae).scores.shape == (0, 5)
    assert ops.score(*sample(2, 0), sae, top_features=3).patch_index.shape == (2, 0, 3)


@pytest.mark.parametrize("activation", ("relu", "topk"))
def test_result_does_not_depend_on_threads(activation: str) -> None:
    x, g = sample(1, 300, dtype=torch.float32)
    sae = make_sae(activation, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(ops.score(x, g, sae, top_features=4))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck(activation: str) -> None:
    x, g = sample(2, 4, dtype=torch.float32)
    sae = make_sae(activation, dtype=torch.float32)
    arguments = (
        x, g, torch.tensor([0, 1]), sae.W_enc.t(), sae.bias, sae.W_dec, sae.theta, sae.gate_scale, sae.mag_bias, None,
        None, None, *codes_of(activation, None, "combined"), sae.k or 0, 2,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fga_fast.score, arguments)


def test_score_refuses_to_be_differentiated() -> None:
    x, g = sample(1, 3)
    with pytest.raises(RuntimeError, match="has no gradient"):
        ops.score(x.requires_grad_(), g, make_sae("relu")).scores.sum().backward()


def test_bad_arguments_are_named() -> None:
    x, g = sample(2, 6)
    sae = make_sae("relu")
    for arguments, message in (
        ((x[..., :5], g, sae), r"W_enc_t must have shape \[70, 5\], got \[70, 24\]"),
        ((x, g[:, :3], sae), r"g must have shape \[2, 6, 24\], got \[2, 3, 24\]"),
        ((x, g.float(), sae), "g must be float64, got float32"),
        ((x[0], g, sae), r"x must be \[B, P, C\]"),
        ((x.float(), g.float(), sae), "W_enc_t is float64 for x of float32"),
        ((x, g[:1], sae), "give image"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.score(*arguments)
    with pytest.raises(ValueError, match="mode: expected one of"):
        ops.score(x, g, sae, "both")
    with pytest.raises(ValueError, match="permutation: expected for mode"):
        ops.score(x, g, sae, "shuffled")
    with pytest.raises(ValueError, match="top_features"):
        ops.score(x, g, sae, "no_sae", top_features=2)
    with pytest.raises(RuntimeError, match=r"image\[0\] is -1"):
        ops.score(x, g, sae, image=torch.tensor([-1, 0]))
    with pytest.raises(RuntimeError, match="top_features must lie in 0 to 70, got 71"):
        ops.score(x, g, sae, top_features=71)
