"""The reference against autograd, against itself in another form, and against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fga_fast.gate import Gate
from fga_fast.models import find_layout
from fga_fast.reference import (
    attention,
    attention_backward,
    attention_relevance,
    contributions,
    explain,
    gate,
    gate_columns,
    relevance_dtype,
    rollout,
    score,
    top_features,
)
from fga_fast.reference.explain import _differentiate, _recording
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder

Build = Callable[..., nn.Module]
IMAGES = (3, 3, 32, 48)


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
        dq, dk, dv, _ = attention_backward(grad_out, row, None, q, k, v, None, ctx.scale, residual=False)
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
    got = attention_backward(grad_out, row, weight, q, k, v, image, 0.7, residual=True)
    want = attention_backward(grad_out, row, weight, q[image], k[image], v[image], None, 0.7, residual=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gradient_of_the_probabilities_is_autograds() -> None:
    """dA = dO V^T, which the relevance is made of, is the gradient that autograd finds for A."""
    q, k, v = random_qkv(2, 5, 5)
    out, probabilities = attention(q, k, v, 0.5)
    grad_out = torch.randn_like(out)
    (want,) = torch.autograd.grad(out, probabilities, grad_out)
    torch.testing.assert_close(grad_out @ v.transpose(-2, -1), want)
    row = torch.randn(2, 5).double()
    *_, got = attention_backward(grad_out, row, None, q, k, v, None, 0.5, residual=True)
    matrix = torch.eye(5).double() + attention_relevance(probabilities, want)
    torch.testing.assert_close(got, (row.unsqueeze(1) @ matrix).squeeze(1))


def test_relevance_by_hand() -> None:
    probabilities = torch.tensor([[[[0.25, 0.75]], [[0.5, 0.5]]]])  # [1, 2, 1, 2]
    gradient = torch.tensor([[[[4.0, -4.0]], [[2.0, 6.0]]]])
    # head 0: relu(1, -3) = (1, 0); head 1: (1, 3); mean: (1, 1.5)
    assert attention_relevance(probabilities, gradient).tolist() == [[[1.0, 1.5]]]


def test_residual_needs_as_many_queries_as_keys() -> None:
    q, k, v = random_qkv(2, 1, 5)
    with pytest.raises(ValueError, match=r"as many queries as keys, got 1 and 5"):
        attention_backward(torch.ones_like(q), torch.ones(2, 1), None, q, k, v, None, 1.0, residual=True)


def test_row_of_an_attention_pool_starts_at_its_relevance() -> None:
    q, k, v = random_qkv(2, 1, 5)
    grad_out = torch.randn_like(q)
    *_, row = attention_backward(grad_out, torch.ones(2, 1).double(), None, q, k, v, None, 0.5, residual=False)
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
    # (I + last)(I + first) = [[1, 0], [2, 1]] [[1, 1], [0, 1]]
    assert rollout([first, last]).tolist() == [[[1.0, 1.0], [2.0, 3.0]]]
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
    want = (seed.unsqueeze(1) @ rollout(maps)).squeeze(1)

    row = seed
    for (q, k, v), grad_out, weight in reversed(list(zip(layers, grads, gates, strict=True))):
        columns = torch.cat((torch.ones(2, prefix).double(), weight), dim=1)
        *_, row = attention_backward(grad_out, row, columns, q, k, v, None, 0.5, residual=True)
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


def random_sae(activation: str, normalize: str | None = None, width: int = 16) -> SparseAutoencoder:
    features = 40
    gated = {name: 0.3 * torch.randn(features).double() for name in ("b_gate", "r_mag", "b_mag")}
    return SparseAutoencoder(
        torch.randn(width, features).double(),
        0.1 * torch.randn(features).double(),
        torch.randn(features, width).double(),
        torch.randn(width).double(),
        activation=activation,
        k=5 if activation == "topk" else None,
        threshold=0.5 if activation in ("jumprelu", "batch_topk") else None,
        normalize=normalize,
        **(gated if activation == "gated" else {}),
    )


ACTIVATIONS = ("relu", "topk", "batch_topk", "jumprelu", "gated")


@pytest.mark.parametrize("normalize", [None, "layer_norm", "constant_norm"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_combined_score_needs_no_dense_feature_gradient(activation: str, normalize: str | None) -> None:
    """s = sum_k f_k h_k = g . (f D), for every kind of autoencoder and with the raw gradient."""
    sae = random_sae(activation, normalize)
    x, g = torch.randn(2, 3, 16).double(), torch.randn(2, 3, 16).double()
    want = (g * (sae.encode(x) @ sae.W_dec)).sum(dim=-1)
    assert want.abs().min() > 0
    torch.testing.assert_close(score(x, g, sae, "combined"), want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scores_of_other_dtypes_are_float32(dtype: torch.dtype) -> None:
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


# -- the whole explanation -------------------------------------------------------------------------------------------


def two_saes() -> dict[int, SparseAutoencoder]:
    return {0: random_sae("relu"), 1: random_sae("topk")}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reg_tokens": 2},
        {"global_pool": "avg"},
        {"global_pool": "avg", "pool_include_prefix": True},
        {"global_pool": "map"},
        {"global_pool": "map", "pool_include_prefix": True, "reg_tokens": 1},
        {"class_token": False, "global_pool": "map"},
    ],
)
def test_explanation_equals_the_row_carried_from_the_head_to_the_patches(
    tiny_vit: Build, settings: dict[str, object]
) -> None:
    """The same relevance from a row vector, seeded at the pooling and carried back block by block."""
    model, saes = tiny_vit(**settings).double(), two_saes()
    images = torch.randn(IMAGES).double()
    result = explain(model, images, None, saes, Gate())
    layout = find_layout(model)
    with _recording(layout) as record:
        logits = model(images.requires_grad_())
        found = _differentiate(logits.amax(dim=1).sum(), record, saes)

    row = torch.zeros(3, layout.tokens).double()
    start, stop = layout.pooled
    row[:, start:stop] = 1 / (stop - start)
    if record.pool is not None and found.pool is not None:
        row[:, start:stop] = (record.pool * found.pool).clamp(min=0).mean(dim=1)[:, 0]
    for block in reversed(range(3)):
        message = torch.einsum(
            "bi,bhij->bj", row, (record.maps[block] * found.maps[block]).clamp(min=0) / record.maps[block].shape[1]
        )
        if block in saes:
            message[:, layout.prefix_tokens :] *= result.gates[block]
        row = row + message
    torch.testing.assert_close(result.relevance, row[:, layout.prefix_tokens :], rtol=1e-11, atol=1e-13)
    assert result.relevance.abs().min() > 0
    assert torch.equal(result.targets, logits.argmax(dim=1))
    torch.testing.assert_close(result.logits, logits)
    for block, sae in saes.items():
        x = record.streams[block][:, layout.prefix_tokens :]
        g = found.streams[block][:, layout.prefix_tokens :]
        torch.testing.assert_close(result.scores[block], score(x, g, sae, "combined"))
        assert torch.equal(result.gates[block], gate(result.scores[block], 10.0, 1.0))


def test_registers_and_class_token_are_not_among_the_patches(tiny_vit: Build) -> None:
    result = explain(tiny_vit(reg_tokens=3), torch.randn(IMAGES), None, {}, Gate())
    assert result.relevance.shape == (3, 6)
    assert result.scores == {}
    assert result.gates == {}


def test_images_do_not_see_each_other(tiny_vit: Build) -> None:
    model, saes = tiny_vit().double(), two_saes()
    images = torch.randn(IMAGES).double()
    together = explain(model, images, torch.tensor([4, 0, 2]), saes, Gate())
    for index, target in enumerate((4, 0, 2)):
        alone = explain(model, images[index : index + 1], target, saes, Gate())
        torch.testing.assert_close(alone.relevance[0], together.relevance[index], rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(alone.scores[1][0], together.scores[1][index], rtol=1e-9, atol=1e-12)


def test_targets_may_be_none_an_int_or_one_an_image(tiny_vit: Build) -> None:
    model, images = tiny_vit(), torch.randn(IMAGES)
    predicted = explain(model, images, None, {}, Gate())
    named = explain(model, images, model(images).argmax(dim=1), {}, Gate())
    assert torch.equal(predicted.relevance, named.relevance)
    same = explain(model, images, 2, {}, Gate())
    assert same.targets.tolist() == [2, 2, 2]
    assert torch.equal(same.relevance, explain(model, images, torch.tensor([2, 2, 2]), {}, Gate()).relevance)
    assert not torch.equal(same.relevance, explain(model, images, 3, {}, Gate()).relevance)


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (5, ValueError, r"classes in \[0, 4\]"),
        (-1, ValueError, r"classes in \[0, 4\]"),
        (torch.tensor([0, 1]), ValueError, r"expected shape \[3\], got \[2\]"),
        (torch.tensor([0.0, 1.0, 2.0]), TypeError, "integer class indices, got dtype torch.float32"),
        (torch.tensor([True, False, True]), TypeError, "integer class indices, got dtype torch.bool"),
    ],
)
def test_bad_targets_leave_the_model_as_it_was(
    tiny_vit: Build, targets: Any, error: type[Exception], message: str
) -> None:
    model = tiny_vit()
    with pytest.raises(error, match=message):
        explain(model, torch.randn(IMAGES), targets, {}, Gate())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("frozen", [False, True])
def test_the_model_is_left_as_it_came(tiny_vit: Build, frozen: bool) -> None:
    model = tiny_vit().double().requires_grad_(not frozen)
    model.blocks[1].requires_grad_(frozen)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(IMAGES).double()
    explain(model, images, None, two_saes(), Gate())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not images.requires_grad


def test_hooks_are_gone_after_an_interrupt(tiny_vit: Build) -> None:
    model = tiny_vit()

    def interrupt(module: nn.Module, inputs: Any) -> None:
        raise KeyboardInterrupt

    handle = model.blocks[1].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        explain(model, torch.randn(IMAGES), None, {}, Gate())
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert explain(model, torch.randn(IMAGES), None, {}, Gate()).relevance.shape == (3, 6)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(tiny_vit: Build, context: Callable[[], Any]) -> None:
    model, images = tiny_vit(), torch.randn(IMAGES)
    want = explain(model, images, None, {}, Gate()).relevance
    with context():
        assert torch.equal(explain(model, images.clone(), None, {}, Gate()).relevance, want)


@pytest.mark.parametrize("images", [0, 1])
def test_small_batches(tiny_vit: Build, images: int) -> None:
    result = explain(tiny_vit().double(), torch.randn(images, 3, 32, 48).double(), None, two_saes(), Gate())
    assert result.relevance.shape == (images, 6)
    assert result.scores[0].shape == (images, 6)
    assert result.logits.shape == (images, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_dtypes_follow_the_float64_explanation(tiny_vit: Build, dtype: torch.dtype) -> None:
    model, images = tiny_vit().double(), torch.randn(IMAGES).double()
    saes = two_saes()
    exact = explain(model, images, 1, saes, Gate())
    rounded = {block: sae.to(dtype) for block, sae in saes.items()}
    got = explain(model.to(dtype), images.to(dtype), 1, rounded, Gate())
    assert got.logits.dtype == dtype
    assert {got.relevance.dtype, got.scores[0].dtype, got.gates[1].dtype} == {torch.float32}
    error = (got.relevance.double() - exact.relevance).norm() / exact.relevance.norm()
    assert error < {torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.3}[dtype]


@pytest.mark.parametrize("mode", ["combined", "activation_only", "gradient_only", "no_sae", "shuffled"])
def test_every_mode_changes_the_explanation(tiny_vit: Build, mode: Any) -> None:
    model, images, saes = tiny_vit().double(), torch.randn(IMAGES).double(), two_saes()
    ungated = explain(model, images, None, {}, Gate()).relevance
    gated = explain(model, images, None, saes, Gate(mode=mode, seed=3)).relevance
    assert not torch.allclose(gated, ungated)
    assert torch.equal(gated, explain(model, images, None, saes, Gate(mode=mode, seed=3)).relevance)
    neutral = explain(model, images, None, saes, Gate(mode=mode, base=1.0)).relevance
    torch.testing.assert_close(neutral, ungated)


def test_shuffled_uses_the_permutation_given(tiny_vit: Build) -> None:
    model, images, saes = tiny_vit().double(), torch.randn(IMAGES).double(), {1: random_sae("relu")}
    combined = explain(model, images, None, saes, Gate()).scores[1]
    identity = explain(model, images, None, saes, Gate(mode="shuffled", permutation=torch.arange(40))).scores[1]
    reverse = explain(model, images, None, saes, Gate(mode="shuffled", permutation=torch.arange(40).flip(0))).scores[1]
    assert torch.equal(combined, identity)
    assert not torch.allclose(combined, reverse)


def test_given_gates_take_the_place_of_the_scores(tiny_vit: Build) -> None:
    model, images, saes = tiny_vit().double(), torch.randn(IMAGES).double(), {1: random_sae("relu")}
    own = explain(model, images, None, saes, Gate())
    again = explain(model, images, None, saes, Gate(base=2.0), given_gates={1: own.gates[1]})
    assert torch.equal(again.relevance, own.relevance)


class TextBeside(nn.Module):
    """A tower, and attention of the wrapper's own that is no part of it."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W]
        text = torch.ones(1, 1, 4, 5, dtype=images.dtype)
        weights = F.scaled_dot_product_attention(text, text, text).mean()
        return self.tower(images) * weights


class Twice(nn.Module):
    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W]
        return self.tower(images) + self.tower(images.flip(-1))


def test_attention_outside_the_tower_is_left_alone(tiny_vit: Build) -> None:
    tower, images = tiny_vit().double(), torch.randn(IMAGES).double()
    want = explain(tower, images, None, {}, Gate()).relevance
    torch.testing.assert_close(explain(TextBeside(tower), images, None, {}, Gate()).relevance, want)


def test_a_tower_that_runs_twice_is_refused(tiny_vit: Build) -> None:
    with pytest.raises(ValueError, match="one attention call in block 0, got a second one"):
        explain(Twice(tiny_vit()), torch.randn(IMAGES), None, {}, Gate())


def test_refusals(tiny_vit: Build) -> None:
    images = torch.randn(IMAGES).double()
    model = tiny_vit().double()
    with pytest.raises(ValueError, match=r"saes: expected blocks in \[0, 2\], got 3"):
        explain(model, images, None, {3: random_sae("relu")}, Gate())
    with pytest.raises(ValueError, match=r"saes\[1\]: expected width 16 .*got 8"):
        explain(model, images, None, {1: random_sae("relu", width=8)}, Gate())
    with pytest.raises(ValueError, match=r"dropout is active in blocks.0.attn.attn_drop.*model.eval\(\)"):
        explain(tiny_vit(attn_drop_rate=0.1).double().train(), images, None, {}, Gate())
    model.head = nn.Unflatten(1, (4, 4))
    with pytest.raises(ValueError, match=r"expected logits \[B, classes\], got shape \[3, 4, 4\]"):
        explain(model, images, None, {}, Gate())


def test_a_forward_without_gradients_is_refused(tiny_vit: Build) -> None:
    class Silent(TextBeside):
        @torch.no_grad()
        def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W]
            return super().forward(images)

    with pytest.raises(ValueError, match=r"carry no gradient.*torch.no_grad\(\)"):
        explain(Silent(tiny_vit().double()), torch.randn(IMAGES).double(), None, {}, Gate())
