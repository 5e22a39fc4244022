"""The Triton kernels in Triton's interpreter, against the reference. Run by test_kernels_interpreted.py.

Tiles are tiny, so that small shapes have ragged tails, several tiles of tokens and features, and several launches. What
the interpreter cannot show: races between threads, bfloat16 products (cast up there), anything about speed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from explicit_attention import relative
from explicit_score import ACTIVATIONS, check_top, copy_of, make_sae, sample, truth
from fga_fast.kernels import tiling
from fga_fast.kernels.score_dense import strongest
from fga_fast.kernels.score_topk import select
from torch import Tensor, nn

from fga_fast import Explainer, composite, kernels, ops, reference
from fga_fast.engine import backends
from fga_fast.sae import SparseAutoencoder

FLOAT = torch.float32
IMAGE = torch.tensor([1, 0, 1, 1])


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    use_tiles(monkeypatch)


def use_tiles(monkeypatch: pytest.MonkeyPatch, fused: bool = True, features: int = 32) -> None:
    small = {key: tiling.Tile(16, 64 if key[2] == "encode" else features, 16, 4, 2, fused) for key in tiling.TILES}
    monkeypatch.setattr(tiling, "TILES", small)
    monkeypatch.setattr(tiling, "UNALIGNED", tiling.Tile(16, 64, 16, 4, 2, False))


def close(got: ops.Score, x: Tensor, g: Tensor, sae: SparseAutoencoder, mode: str = "combined", **more: Any) -> bool:
    return relative(got.scores, truth(x, g, sae, mode, **more)) < 2e-5


def double(sae: SparseAutoencoder) -> SparseAutoencoder:
    wide: SparseAutoencoder = copy_of(sae).double()
    return wide


def same_top(got: ops.Score, x: Tensor, g: Tensor, sae: SparseAutoencoder, mode: str = "combined", **more: Any) -> None:
    """The features themselves, in their order: contributions are far enough apart in these samples."""
    k = got.image_index.shape[-1]
    contributions = reference.contributions(x.double(), g.double(), double(sae), mode, **more)
    want = reference.top_features(contributions, k)
    assert torch.equal(got.patch_index, want.patch_index) and torch.equal(got.image_index, want.image_index)
    torch.testing.assert_close(got.patch_contribution.double(), want.patch_contribution, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.image_contribution.double(), want.image_contribution, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("normalize", (None, "layer_norm", "constant_norm"))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, normalize: str | None) -> None:
    """Ragged tokens, features and width; four targets of two images in no order; the strongest features."""
    x, g = sample(2, 9, dtype=FLOAT, rows=4)
    sae = make_sae(activation, normalize=normalize, dtype=FLOAT)
    got = kernels.score(x, g, sae, image=IMAGE, top_features=3)
    assert close(got, x, g, sae, image=IMAGE)
    same_top(got, x, g, sae, image=IMAGE)


@pytest.mark.parametrize("fused", (True, False))
@pytest.mark.parametrize("width", (7, 32))
def test_one_target_an_image(monkeypatch: pytest.MonkeyPatch, fused: bool, width: int) -> None:
    use_tiles(monkeypatch, fused)
    x, g = sample(3, 7, width, dtype=FLOAT)
    sae = make_sae("relu", width, dtype=FLOAT)
    assert close(kernels.score(x, g, sae), x, g, sae)


@pytest.mark.parametrize("activation", ("relu", "topk"))
@pytest.mark.parametrize("mode", ops.MODES)
def test_modes(mode: str, activation: str) -> None:
    x, g = sample(2, 5, dtype=FLOAT, rows=4)
    sae = make_sae(activation, dtype=FLOAT)
    more = {"permutation": torch.randperm(70)} if mode == "shuffled" else {}
    top = 0 if mode in ("gradient_only", "no_sae") else 3
    got = kernels.score(x, g, sae, mode, image=IMAGE, top_features=top, **more)
    assert close(got, x, g, sae, mode, image=IMAGE, **more)
    if top:
        same_top(got, x, g, sae, mode, image=IMAGE, **more)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("wide_sae", (False, True))
@pytest.mark.parametrize("activation", ("relu", "topk", "gated"))
def test_sixteen_bits_err_at_most_twice_what_plain_torch_does(
    activation: str, wide_sae: bool, dtype: torch.dtype
) -> None:
    x, g = sample(2, 8, width=32, dtype=dtype)
    sae = make_sae(activation, width=32, features=96, dtype=FLOAT, k=16)
    low = copy_of(sae).to(dtype)
    got = kernels.score(x, g, sae if wide_sae else low).scores
    want = truth(x, g, sae if wide_sae else low)
    assert got.dtype == FLOAT
    assert relative(got, want) <= 2 * relative(reference.score(x, g, low, "combined"), want)


@pytest.mark.parametrize("activation", ("relu", "topk"))
def test_a_small_workspace_takes_several_launches(monkeypatch: pytest.MonkeyPatch, activation: str) -> None:
    x, g = sample(2, 21, dtype=FLOAT, rows=4)
    sae = make_sae(activation, dtype=FLOAT)
    whole = kernels.score(x, g, sae, image=IMAGE, top_features=5)
    monkeypatch.setattr(tiling, "WORKSPACE", 1)
    parts = kernels.score(x, g, sae, image=IMAGE, top_features=5)
    assert close(parts, x, g, sae, image=IMAGE)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("activation", ("relu", "topk"))
def test_same_bits_every_time(activation: str) -> None:
    x, g = sample(2, 9, dtype=FLOAT, rows=4)
    sae = make_sae(activation, dtype=FLOAT)
    first, second = (kernels.score(x, g, sae, image=IMAGE, top_features=4) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(("k", "features", "longest"), ((1, 70, 16384), (70, 70, 16384), (3, 300, 256), (40, 300, 256)))
@pytest.mark.parametrize("activation", ("topk", "topk_signed"))
def test_selection(monkeypatch: pytest.MonkeyPatch, activation: str, k: int, features: int, longest: int) -> None:
    """In one round, by groups of features, and by a sort where registers do not suffice; top features beyond k."""
    monkeypatch.setattr(tiling, "LONGEST_SELECTION", longest)
    x, g = sample(2, 3, dtype=FLOAT)
    sae = make_sae(activation, features=features, dtype=FLOAT, k=k)
    got = kernels.score(x, g, sae, top_features=4)
    assert close(got, x, g, sae)
    same_top(got, x, g, sae)


@pytest.mark.parametrize("longest", (16384, 256))
def test_topk_ties_go_to_the_lowest_feature(monkeypatch: pytest.MonkeyPatch, longest: int) -> None:
    """All pre-activations are equal but one; decoder rows tell which were kept."""
    monkeypatch.setattr(tiling, "LONGEST_SELECTION", longest)
    features, width = 400, 4
    encoder = torch.ones(width, features)
    encoder[:, 399] = 2
    decoder = torch.zeros(features, width)
    decoder[0, 0] = decoder[1, 1] = decoder[2, 2] = decoder[399, 3] = 1
    sae = SparseAutoencoder(encoder, None, decoder, torch.zeros(width), "topk", k=3)
    x, g = torch.ones(1, 2, width), torch.tensor([1.0, 10.0, 100.0, 1000.0]).expand(1, 2, width)
    assert kernels.score(x, g, sae).scores.tolist() == [[4 * 11.0 + 8 * 1000.0] * 2]


def test_selection_orders_zeros_and_nan() -> None:
    """NaN before all else whatever its sign, -0 and 0 equal, -inf last; listed by feature."""
    nan = torch.tensor([-1], dtype=torch.int32).view(FLOAT)  # sign bit set
    codes = torch.tensor([[-0.0, 0.0, 2.0, -3.0, float("-inf")], [1.0, 2.0, 3.0, 4.0, 5.0]])
    codes[1, 3] = nan
    kept = {1: ([2], [3]), 2: ([0, 2], [3, 4]), 3: ([0, 1, 2], [2, 3, 4]), 4: ([0, 1, 2, 3], [1, 2, 3, 4])}
    for k, (first, second) in kept.items():
        value, index = select(codes, codes, 0, k, False)
        assert index.tolist() == [first, second]
        torch.testing.assert_close(value, codes.gather(-1, index.long()), equal_nan=True, rtol=0, atol=0)


def test_thresholds_below_zero_keep_no_negative_codes() -> None:
    x, g = sample(2, 4, dtype=FLOAT)
    sae = make_sae("relu", dtype=FLOAT)
    low = SparseAutoencoder(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, "jumprelu", threshold=torch.linspace(-1, 1, 70))
    assert close(kernels.score(x, g, low), x, g, low)


@pytest.mark.parametrize("mode", ("combined", "shuffled"))
def test_few_active_features_are_gathered(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    x, g = sample(2, 6, dtype=FLOAT, rows=4)
    sae = make_sae("relu", dtype=FLOAT, shift=-2.0)
    more = {"permutation": torch.randperm(70)} if mode == "shuffled" else {}
    dense = kernels.score(x, g, sae, mode, image=IMAGE, **more)
    sae.expected_l0 = 0.1
    monkeypatch.setitem(kernels.score.__globals__, "dense", None)  # not called
    gathered = kernels.score(x, g, sae, mode, image=IMAGE, **more)
    assert close(gathered, x, g, sae, mode, image=IMAGE, **more)
    torch.testing.assert_close(gathered.scores, dense.scores, rtol=1e-4, atol=1e-4)


def test_the_strongest_are_those_of_a_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties, zeros, NaN and Inf; more entries than one program looks at once; an index shared by all rows."""
    value = torch.randint(-3, 4, (3, 5000)).float()
    value[0, 4500], value[0, 7], value[0, 4999], value[1] = 9, float("inf"), float("nan"), 0
    value[1, 4321] = -2
    index = torch.arange(5000, dtype=torch.int32).expand(3, 5000)
    got = strongest(index, value, 9)
    monkeypatch.setattr(tiling, "FEW", 0)
    want = strongest(index, value, 9)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=0, equal_nan=True)
    assert want[0][0, :4].tolist()[:3] == [4999, 7, 4500] and want[0][1].tolist() == [4321] + [-1] * 8


def test_top_features_of_equal_strength_come_in_order() -> None:
    sae = SparseAutoencoder(torch.ones(2, 70), None, torch.ones(70, 2), torch.zeros(2))
    got = kernels.score(torch.ones(1, 3, 2), torch.ones(1, 3, 2), sae, top_features=36)
    assert got.patch_index.tolist() == [[list(range(36))] * 3]
    assert got.image_index.tolist() == [list(range(36))]
    assert got.image_contribution.tolist() == [[12.0] * 36]


@pytest.mark.parametrize("activation", ("relu", "topk"))
def test_nothing_to_find(activation: str) -> None:
    """Zero gradients, a dictionary that never fires, fewer contributions than asked for."""
    x, g = sample(1, 4, dtype=FLOAT)
    sae = make_sae(activation, dtype=FLOAT, shift=-100.0)
    for got in (kernels.score(x, g, sae, top_features=2), kernels.score(x, g * 0, make_sae("relu", dtype=FLOAT))):
        assert torch.equal(got.scores, torch.zeros(1, 4))
    few = kernels.score(x, torch.zeros_like(g), make_sae(activation, dtype=FLOAT), top_features=2)
    assert few.patch_index.unique().tolist() == [-1] and few.image_index.tolist() == [[-1, -1]]
    check_top(few, x, torch.zeros_like(g), make_sae(activation, dtype=FLOAT))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_finite_is_not_taken_for_inactive(activation: str) -> None:
    x, g = sample(2, 3, dtype=FLOAT)
    x = x.clone()
    x[1, 2, 2] = float("nan")
    assert kernels.score(x, g, make_sae(activation, dtype=FLOAT)).scores.isnan().nonzero().tolist() == [[1, 2]]


def test_features_of_what_is_not_finite_are_listed() -> None:
    x, g = sample(2, 3, dtype=FLOAT)
    x, sae = x.clone(), make_sae("relu", dtype=FLOAT)
    x[1, 2, 2] = float("nan")
    got = kernels.score(x, g, sae, top_features=3)
    assert got.patch_index[1, 2].tolist() == [0, 1, 2] and bool(got.patch_contribution[1, 2].isnan().all())
    assert not bool(got.patch_contribution[0].isnan().any())


@pytest.mark.parametrize("normalize", ("layer_norm", "constant_norm"))
def test_a_token_of_zeros(normalize: str) -> None:
    x, g = sample(1, 4, dtype=FLOAT)
    x = x.clone()
    x[0, 2] = 0
    sae = make_sae("relu", normalize=normalize, dtype=FLOAT)
    assert close(kernels.score(x, g, sae), x, g, sae)


@pytest.mark.parametrize("activation", ("relu", "topk"))
def test_any_strides(activation: str) -> None:
    sae = make_sae(activation, dtype=FLOAT, normalize="layer_norm")
    x, g = torch.randn(24, 5, 2).permute(2, 1, 0), torch.randn(5, 2, 48).transpose(0, 1)[..., ::2]
    want = kernels.score(x.contiguous(), g.contiguous(), sae)
    assert torch.equal(kernels.score(x, g, sae).scores, want.scores) and close(want, x, g, sae)


@pytest.mark.parametrize(("images", "patches", "rows"), ((0, 3, 0), (2, 0, 2), (2, 3, 0), (1, 1, 1)))
@pytest.mark.parametrize("activation", ("relu", "topk"))
def test_empty_and_single(activation: str, images: int, patches: int, rows: int) -> None:
    x, g = torch.randn(images, patches, 24), torch.randn(rows, patches, 24)
    sae = make_sae(activation, dtype=FLOAT)
    image = None if rows == images else torch.zeros(rows, dtype=torch.int64)
    got = kernels.score(x, g, sae, image=image, top_features=2)
    shapes = (rows, patches), (rows, patches, 2), (rows, patches, 2), (rows, 2), (rows, 2)
    assert tuple(t.shape for t in got) == shapes
    if rows == 1:
        assert close(got, x, g, sae)


def test_targets_by_vmap() -> None:
    x, g = sample(2, 4, dtype=FLOAT, rows=6)
    sae = make_sae("relu", dtype=FLOAT)
    got = torch.vmap(lambda each: kernels.score(x, each, sae, top_features=2), in_dims=0)(g.view(3, 2, 4, 24))
    want = [kernels.score(x, each, sae, top_features=2) for each in g.view(3, 2, 4, 24)]
    for i, one in enumerate(got):
        torch.testing.assert_close(one, torch.stack([each[i] for each in want]))
    scores = torch.randn(3, 2, 5)
    assert torch.equal(torch.vmap(kernels.gate)(scores), torch.stack([kernels.gate(each) for each in scores]))


@pytest.mark.parametrize("targets", (None, [[0, 1, 3], [2, 2, 4]]))
def test_whole_explanation(
    monkeypatch: pytest.MonkeyPatch, tiny_vit: Callable[..., nn.Module], targets: list[list[int]] | None
) -> None:
    model, images = tiny_vit(), torch.randn(2, 3, 32, 48)
    saes = {0: make_sae("relu", 16, 40, FLOAT), 1: make_sae("topk", 16, 40, FLOAT, normalize="layer_norm")}
    want = Explainer(model, saes=saes, backend="reference", top_features=3, preset="published")(images, targets=targets)
    monkeypatch.setattr(backends, "COMPOSITE", backends.Stages(composite.attention, kernels.score, kernels.gate))
    got = Explainer(model, saes=saes, backend="composite", top_features=3, preset="published")(images, targets=targets)
    torch.testing.assert_close(got.relevance, want.relevance, rtol=1e-4, atol=1e-4)
    for layer in saes:
        torch.testing.assert_close(got.scores[layer], want.scores[layer], rtol=1e-4, atol=1e-4)
        assert torch.equal(got.features[layer].image_index, want.features[layer].image_index)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.fga_fast.triton_gate, (torch.randn(2, 7), 10.0, 1.0))
    x, g = sample(1, 2, dtype=FLOAT)
    for activation in ("relu", "topk"):
        sae = make_sae(activation, dtype=FLOAT)
        weights = sae.W_enc.t(), sae.bias, sae.W_dec, None, None, None, None
        arguments = (x, g, None, *weights, activation, "", "combined", None, sae.k or 0, 2)
        torch.library.opcheck(torch.ops.fga_fast.triton_score, arguments)


def test_no_gradient() -> None:
    x, g = sample(1, 2, dtype=FLOAT)
    with pytest.raises(RuntimeError, match="has no gradient"):
        kernels.score(x, g.clone().requires_grad_(), make_sae("relu", dtype=FLOAT)).scores.sum().backward()
    with pytest.raises(RuntimeError, match="has no gradient"):
        kernels.gate(torch.randn(1, 4, requires_grad=True)).sum().backward()


def test_bad_arguments_are_named() -> None:
    x, g = sample(2, 3, dtype=FLOAT)
    sae = make_sae("relu", dtype=FLOAT)

    def refused(match: str, *arguments: Any, **more: Any) -> None:
        with pytest.raises(RuntimeError, match=match):
            kernels.score(*arguments, **more)

    refused("x must be float32, float16 or bfloat16 in Triton kernels, got float64", x.double(), g.double(), sae)
    refused("the dictionary must be torch.float16 like x, or float32", x.half(), g.half(), sae.to(torch.bfloat16))
    sae = make_sae("relu", dtype=FLOAT)
    refused(r"x must have shape \[2, 3, 24\], got \[2, 3, 23\]", x[..., 1:], g, sae)
    refused(r"g must have shape \[4, 3, 24\], got \[2, 3, 24\]", x, g, sae, image=IMAGE)
    refused("image must be within 0 to 1 everywhere", x, g, sae, image=torch.tensor([0, 2]))
    refused("permutation must be within 0 to 69", x, g, sae, mode="shuffled", permutation=torch.arange(70) + 1)
    refused("top_features must be 0 to 70", x, g, sae, top_features=71)
    with pytest.raises(ValueError, match="mode: expected one of"):
        kernels.score(x, g, sae, "other")
    with pytest.raises(RuntimeError, match=r"scores must be \[M, P\], got shape \[3\]"):
        kernels.gate(torch.zeros(3))
    with pytest.raises(RuntimeError, match="scores must be float32 in Triton kernels, got float64"):
        kernels.gate(torch.zeros(1, 3, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="at most 16384 patches in Triton kernels, got 16385"):
        kernels.gate(torch.zeros(1, 16385))
    with pytest.raises(RuntimeError, match="base must be positive"):
        kernels.gate(torch.zeros(1, 3), base=0.0)


@pytest.mark.parametrize("patches", (1, 2, 17, 196, 197, 1025, 4096, 16384))
def test_gates(patches: int) -> None:
    scores = torch.randn(2, patches) * 3 - 5
    got = kernels.gate(scores, 7.0, 0.8)
    torch.testing.assert_close(got.double(), reference.gate(scores.double(), 7.0, 0.8), rtol=1e-5, atol=1e-6)
    assert torch.equal(got, kernels.gate(scores, 7.0, 0.8))


def test_gates_of_ties_and_of_what_is_not_finite() -> None:
    scores = torch.randn(5, 10)
    scores[0] = 3.25
    scores[1], scores[1, 3], scores[1, 4] = 0, 5, -5
    scores[2, 7] = float("nan")
    scores[3, 2], scores[3, 5] = float("inf"), float("-inf")
    scores[4, ::2] = -0.0
    want = reference.gate(scores, 10.0, 1.0)
    torch.testing.assert_close(kernels.gate(scores), want, equal_nan=True, rtol=1e-5, atol=1e-6)
    assert torch.equal(kernels.gate(scores)[0], torch.ones(10)) and bool(want[2].isnan().all())
    strided = torch.randn(6, 5).t()
    assert torch.equal(kernels.gate(strided), kernels.gate(strided.contiguous()))
    assert kernels.gate(torch.zeros(0, 5)).shape == (0, 5) and kernels.gate(torch.zeros(5, 0)).shape == (5, 0)
