"""The reference against autograd, against itself in another form, and against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fga_fast.reference import (
    attention,
    attention_backward,
    attention_relevance,
    contributions,
    gate,
    gate_columns,
    relevance_dtype,
    rollout,
    score,
    top_features,
)
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder

Build = Callable[..., SparseAutoencoder]


def random_qkv(images: int, queries: int, tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    heads, width = 2, 4
    shapes = [(images, heads, queries, width), (images, heads, tokens, width), (images, heads, tokens, width)]
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


class Attention(torch.autograd.Function):
    """The reference pair as an autograd function, so that gradcheck can look at it."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        return attention(q, k, v, scale)[0]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        row = grad_out.new_zeros(q.shape[0], q.shape[2])
        dq, dk, dv, _ = attention_backward(grad_out, row, None, q, k, v, None, ctx.scale)
        return dq, dk, dv, None


# -- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("queries", "tokens"), [(5, 5), (1, 5), (1, 1)])
def test_attention_equals_torch(queries: int, tokens: int) -> None:
    q, k, v = random_qkv(2, queries, tokens)
    out, probabilities = attention(q, k, v, 0.3)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, scale=0.3))
    torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(2, 2, queries, dtype=torch.float64))
    bias = torch.randn(1, 1, queries, tokens, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.3)
    torch.testing.assert_close(attention(q, k, v, 0.3, bias)[0], expected)


@pytest.mark.parametrize(("queries", "tokens"), [(5, 5), (1, 5), (1, 1)])
def test_attention_backward_passes_gradcheck(queries: int, tokens: int) -> None:
    assert torch.autograd.gradcheck(lambda q, k, v: Attention.apply(q, k, v, 0.7), random_qkv(2, queries, tokens))


def test_attention_backward_gathers_images() -> None:
    """Rows that share an image get what they would get with a copy of it each."""
    q, k, v = (tensor.detach() for tensor in random_qkv(2, 5, 5))
    image = torch.tensor([1, 0, 1])
    grad_out, row = torch.randn(3, 2, 5, 4).double(), torch.randn(3, 5).double()
    weight = torch.rand(3, 5).double()
    got = attention_backward(grad_out, row, weight, q, k, v, image, 0.7)
    want = attention_backward(grad_out, row, weight, q[image], k[image], v[image], None, 0.7)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gradient_of_the_probabilities_is_autograds() -> None:
    """dA = dO V^T, which the relevance is made of, is the gradient that autograd finds for A."""
    q, k, v = random_qkv(2, 5, 5)
    out, probabilities = attention(q, k, v, 0.5)
    grad_out = torch.randn_like(out)
    (want,) = torch.autograd.grad(out, probabilities, grad_out)
    torch.testing.assert_close(grad_out @ v.transpose(-2, -1), want)
    row = torch.randn(2, 5).double()
    *_, got = attention_backward(grad_out, row, None, q, k, v, None, 0.5)
    torch.testing.assert_close(got, (row.unsqueeze(1) @ attention_relevance(probabilities, want)).squeeze(1))


def test_relevance_by_hand() -> None:
    probabilities = torch.tensor([[[[0.25, 0.75]], [[0.5, 0.5]]]])  # [1, 2, 1, 2]
    gradient = torch.tensor([[[[4.0, -4.0]], [[2.0, 6.0]]]])
    # head 0: relu(1, -3) = (1, 0); head 1: (1, 3); mean: (1, 1.5)
    assert attention_relevance(probabilities, gradient).tolist() == [[[1.0, 1.5]]]
    # without the relu: head 0 (1, -3), head 1 (1, 3)
    assert attention_relevance(probabilities, gradient, signed=True).tolist() == [[[1.0, 0.0]]]


@pytest.mark.parametrize("shape", [(5, 5), (2, 1, 5, 5), (1, 2, 1, 5)])
def test_attention_backward_with_a_bias_and_signed(shape: tuple[int, ...]) -> None:
    """Gradients of autograd through the biased softmax; the row through the maps themselves."""
    q, k, v = random_qkv(2, 5, 5)
    bias, image = torch.randn(shape).double(), torch.tensor([1, 0, 1])
    out, probabilities = attention(
        q[image], k[image], v[image], 0.7, bias[image] if len(shape) == 4 and shape[0] == 2 else bias
    )
    grad_out, row = torch.randn_like(out), torch.rand(3, 5).double()
    want = torch.autograd.grad(out, (q, k, v), grad_out, retain_graph=True)
    (d_probabilities,) = torch.autograd.grad(out, probabilities, grad_out)
    for signed in (False, True):
        *gradients, got = attention_backward(grad_out, row, None, q, k, v, image, 0.7, bias=bias, signed=signed)
        for gradient, expected in zip(gradients, want, strict=True):
            torch.testing.assert_close(torch.zeros_like(expected).index_add(0, image, gradient), expected)
        matrix = attention_relevance(probabilities, d_probabilities, signed)
        torch.testing.assert_close(got, (row.unsqueeze(1) @ matrix).squeeze(1))


def test_row_of_an_attention_pool_starts_at_its_relevance() -> None:
    q, k, v = random_qkv(2, 1, 5)
    grad_out = torch.randn_like(q)
    *_, row = attention_backward(grad_out, torch.ones(2, 1).double(), None, q, k, v, None, 0.5)
    _, probabilities = attention(q, k, v, 0.5)
    torch.testing.assert_close(row, attention_relevance(probabilities, grad_out @ v.transpose(-2, -1))[:, 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_relevance_is_held_in_32_bit_or_64_bit(dtype: torch.dtype) -> None:
    maps = torch.rand(1, 2, 3, 3).to(dtype)
    assert attention_relevance(maps, maps).dtype == relevance_dtype(dtype)
    assert relevance_dtype(dtype) == (torch.float64 if dtype == torch.float64 else torch.float32)


# -- rollout ---------------------------------------------------------------------------------------------------------


def test_rollout_by_hand() -> None:
    first = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
    last = torch.tensor([[[0.0, 0.0], [2.0, 0.0]]])
    # (I + last)(I + first) - I = [[1, 0], [2, 1]] [[1, 1], [0, 1]] - I
    assert rollout([first, last]).tolist() == [[[0.0, 1.0], [2.0, 2.0]]]
    with pytest.raises(ValueError, match="one map a block, got none"):
        rollout([])


def test_gates_multiply_patch_columns_only() -> None:
    gated = gate_columns(torch.ones(1, 3, 3), torch.tensor([[2.0, 0.5]]), prefix_tokens=1)
    assert gated.tolist() == [[[1.0, 2.0, 0.5]] * 3]
    with pytest.raises(ValueError, match=r"expected 1 patches .*got 2"):
        gate_columns(torch.ones(1, 3, 3), torch.ones(1, 2), prefix_tokens=2)


def test_the_row_that_rides_the_backward_pass_is_the_matrix_row() -> None:
    """v <- v + w * (v Cbar), from the last block to the first, gives the row of (I + Cbar_L) ... (I + Cbar_1)."""
    prefix, tokens, blocks = 2, 6, 4
    layers = [tuple(tensor.detach() for tensor in random_qkv(2, tokens, tokens)) for _ in range(blocks)]
    grads = [torch.randn(2, 2, tokens, 4).double() for _ in range(blocks)]
    gates = [torch.rand(2, tokens - prefix).double() * 3 for _ in range(blocks)]
    maps = []
    for (q, k, v), grad_out, weight in zip(layers, grads, gates, strict=True):
        _, probabilities = attention(q, k, v, 0.5)
        relevance = attention_relevance(probabilities, grad_out @ v.transpose(-2, -1))
        maps.append(gate_columns(relevance, weight, prefix))
    seed = torch.rand(2, tokens).double()
    want = seed + (seed.unsqueeze(1) @ rollout(maps)).squeeze(1)

    row = seed
    for (q, k, v), grad_out, weight in reversed(list(zip(layers, grads, gates, strict=True))):
        columns = torch.cat((torch.ones(2, prefix).double(), weight), dim=1)
        *_, sent = attention_backward(grad_out, row, columns, q, k, v, None, 0.5)
        row = row + sent
    torch.testing.assert_close(row, want, rtol=1e-12, atol=1e-12)


# -- gate ------------------------------------------------------------------------------------------------------------


def test_gate_by_hand_with_lower_medians() -> None:
    scores = torch.tensor([[10.0, 1.0, 3.0, 2.0]]).double()
    # lower median of (1, 2, 3, 10): 2; deviations 8, -1, 1, 0; lower median of (0, 1, 1, 8): 1
    z = torch.tensor([[8.0, -1.0, 1.0, 0.0]]).double() / (1.4826 * (1 + 1e-8))
    torch.testing.assert_close(gate(scores, 10.0, 0.5), 10.0 ** torch.tanh(0.5 * z), rtol=1e-14, atol=0)
    odd = torch.tensor([[0.0, 5.0, -1.0]]).double()
    # median 0; deviations 0, 5, -1; median of (0, 1, 5): 1
    z = torch.tensor([[0.0, 5.0, -1.0]]).double() / (1.4826 * (1 + 1e-8))
    torch.testing.assert_close(gate(odd, 2.0, 1.0), 2.0 ** torch.tanh(z), rtol=1e-14, atol=0)


def test_gate_range_and_special_cases() -> None:
    weights = gate(torch.randn(4, 31) * 1e6, 10.0, 5.0)
    assert ((weights >= 0.1 - 1e-6) & (weights <= 10.0 + 1e-5)).all()
    assert weights.max() > 9.9
    assert torch.equal(gate(torch.full((2, 5), 7.0), 10.0, 1.0), torch.ones(2, 5))  # all scores equal
    assert gate(torch.tensor([[3.0]]), 10.0, 1.0).tolist() == [[1.0]]  # one patch
    assert torch.equal(gate(torch.randn(2, 5), 1.0, 1.0), torch.ones(2, 5))  # base 1 gates nothing
    assert gate(torch.empty(0, 5), 10.0, 1.0).shape == (0, 5)
    # More than half of the scores are equal: MAD is 0, and whatever differs saturates.
    saturated = gate(torch.tensor([[1.0, 1.0, 1.0, 1.5, 0.5]]), 10.0, 1.0)
    torch.testing.assert_close(saturated, torch.tensor([[1.0, 1.0, 1.0, 10.0, 0.1]]))
    with pytest.raises(ValueError, match="at least one patch"):
        gate(torch.empty(2, 0), 10.0, 1.0)


# -- score -----------------------------------------------------------------------------------------------------------


def small_sae() -> SparseAutoencoder:
    w_enc = torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]])  # [2, 3]
    w_dec = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])  # [3, 2]
    return SparseAutoencoder(w_enc, torch.tensor([0.0, -1.0, 0.0]), w_dec, torch.tensor([1.0, 0.0]))


X = torch.tensor([[[3.0, 4.0], [0.0, 0.5]]])  # [1, 2, 2]; codes (2, 3, 0) and (0, 0, 1)
G = torch.tensor([[[1.0, -1.0], [2.0, 3.0]]])  # [1, 2, 2]; feature gradients (1, -2, 0) and (2, 6, 5)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("combined", [2.0 - 6.0 + 0.0, 5.0]),
        ("activation_only", [5.0, 1.0]),
        ("gradient_only", [-1.0, 13.0]),
        ("no_sae", [3.0 - 4.0, 1.5]),
        ("shuffled", [2.0 * -2.0 + 3.0 * 0.0, 2.0]),  # decoder rows (1, 2, 0): gradients (-2, 0, 1) and (6, 5, 2)
    ],
)
def test_score_modes_by_hand(mode: str, expected: list[float]) -> None:
    permutation = torch.tensor([1, 2, 0]) if mode == "shuffled" else None
    assert score(X, G, small_sae(), mode, permutation=permutation).tolist() == [expected]


def test_contributions_by_hand() -> None:
    assert contributions(X, G, small_sae()).tolist() == [[[2.0, -6.0, 0.0], [0.0, 0.0, 5.0]]]


def test_score_gathers_images() -> None:
    x = torch.cat((X, X + 1))
    image = torch.tensor([1, 0, 0])
    g = torch.randn(3, 2, 2)
    for mode in ("combined", "activation_only", "gradient_only", "no_sae"):
        got = score(x, g, small_sae(), mode, image=image)
        assert torch.equal(got, score(x[image], g, small_sae(), mode)), mode
        assert got.shape == (3, 2)


def test_score_refuses() -> None:
    with pytest.raises(ValueError, match="mode: expected 'combined'"):
        score(X, G, small_sae(), "both")
    with pytest.raises(ValueError, match="sae: expected a SparseAutoencoder"):
        score(X, G, None, "combined")
    with pytest.raises(ValueError, match="permutation: expected a permutation"):
        score(X, G, small_sae(), "shuffled")
    with pytest.raises(ValueError, match="'no_sae'"):
        contributions(X, G, small_sae(), "no_sae")


ACTIVATIONS = ("relu", "topk", "batch_topk", "jumprelu", "gated")


@pytest.mark.parametrize("normalize", [None, "layer_norm", "constant_norm"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_combined_score_needs_no_dense_feature_gradient(
    activation: str, normalize: str | None, random_sae: Build
) -> None:
    """s = sum_k f_k h_k = g . (f D), for every kind of autoencoder and with the raw gradient."""
    sae = random_sae(activation, normalize)
    x, g = torch.randn(2, 3, 16).double(), torch.randn(2, 3, 16).double()
    want = (g * (sae.encode(x) @ sae.W_dec)).sum(dim=-1)
    assert want.abs().min() > 0
    torch.testing.assert_close(score(x, g, sae, "combined"), want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scores_of_other_dtypes_are_float32(dtype: torch.dtype, random_sae: Build) -> None:
    sae = random_sae("relu").to(dtype)
    x, g = torch.randn(2, 3, 16).to(dtype), torch.randn(2, 3, 16).to(dtype)
    for mode in ("combined", "activation_only", "gradient_only", "no_sae"):
        assert score(x, g, sae, mode).dtype == torch.float32, mode


# -- strongest features ----------------------------------------------------------------------------------------------


def test_top_features_by_hand() -> None:
    contribution = torch.tensor([[[1.0, -3.0, 0.0, 3.0], [2.0, 1.0, -4.0, 0.0]]])  # per image: (3, -2, -4, 3)
    top = top_features(contribution, 3)
    assert top.patch_index.tolist() == [[[1, 3, 0], [2, 0, 1]]]
    assert top.patch_contribution.tolist() == [[[-3.0, 3.0, 1.0], [-4.0, 2.0, 1.0]]]
    assert top.image_index.tolist() == [[2, 0, 3]]
    assert top.image_contribution.tolist() == [[-4.0, 3.0, 3.0]]
    assert top.patch_index.dtype == torch.int64


def test_top_features_breaks_ties_by_index() -> None:
    top = top_features(torch.ones(1, 2, 300), 300)
    assert top.patch_index[0, 1].tolist() == list(range(300))
    assert top.image_index[0].tolist() == list(range(300))


@pytest.mark.parametrize("k", [0, 5])
def test_top_features_refuses_k(k: int) -> None:
    with pytest.raises(ValueError, match=f"k: expected 1 to 4 .*got {k}"):
        top_features(torch.ones(1, 2, 4), k)
