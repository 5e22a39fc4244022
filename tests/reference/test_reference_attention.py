"""However a model writes its attention, hands over its tokens and calls its blocks: the reference sees the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from own_vit import FORMS, HEADS, IMAGES, TOKENS, OwnViT, own_vit
from torch import Tensor, nn

from fga_fast.models.block_io import TapeError
from fga_fast.question.readout import Tensors
from fga_fast.reference import explain
from fga_fast.settings import Gate, Settings

Build = Callable[..., Any]


def images() -> Tensor:
    return torch.randn(IMAGES, generator=torch.Generator().manual_seed(1)).double()


def explained(model: OwnViT, saes: dict[int, Any] | None = None, **settings: Any) -> Tensors:
    return explain(model, images(), None, saes or {}, Settings(**settings), layout=model.layout())


def assert_same(got: Tensors, want: Tensors, tolerance: float = 1e-11) -> None:
    assert want.relevance.abs().min() > 0
    torch.testing.assert_close(got.logits, want.logits, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.relevance, want.relevance, rtol=tolerance, atol=tolerance)
    assert got.scores.keys() == want.scores.keys()
    for block, scores in want.scores.items():
        torch.testing.assert_close(got.scores[block], scores, rtol=100 * tolerance, atol=100 * tolerance)


@pytest.mark.parametrize("backward", ["exact", "conservative"])
@pytest.mark.parametrize("mask", [None, (TOKENS, TOKENS), (1, HEADS, TOKENS, TOKENS)], ids=["no mask", "2-D", "4-D"])
@pytest.mark.parametrize("form", [*FORMS, "mha"])
def test_forms_of_attention(form: str, mask: tuple[int, ...] | None, backward: Any, random_sae: Build) -> None:
    bias = None if mask is None else torch.randn(mask).double()
    want = explained(own_vit("torch.softmax", mask=bias), {1: random_sae("relu")}, backward=backward)
    torch.manual_seed(0)  # the autoencoder again
    _ = None if mask is None else torch.randn(mask)
    if form == "mha" and mask is not None and len(mask) == 4:
        bias = bias[0].repeat(IMAGES[0], 1, 1)  # [B H, N, N]
    got = explained(own_vit(form, mask=bias), {1: random_sae("relu")}, backward=backward)
    assert_same(got, want, 1e-5 if form == "upcast" else 1e-11)
    if mask is not None:
        assert not torch.allclose(want.logits, explained(own_vit("sdpa")).logits)


@pytest.mark.parametrize("settings", [{"returns": "tuple"}, {"returns": "tokens first"}, {"by_keyword": True}])
@pytest.mark.parametrize("method", ["rollout", "input_x_gradient"])
def test_blocks_may_hand_over_their_tokens_differently(settings: Any, method: Any, random_sae: Build) -> None:
    sae = {1: random_sae("relu")}
    want = explained(own_vit(), sae, method=method)
    assert_same(explained(own_vit(**settings), sae, method=method), want)


def test_streams_changed_in_place_are_seen_as_they_left_the_block(random_sae: Build) -> None:
    sae = {1: random_sae("relu")}
    model = own_vit(adds_in_place=True)
    result = explained(model, sae, method="input_x_gradient")
    streams: list[Tensor] = []
    handle = model.layers[1].register_forward_hook(lambda _module, _inputs, out: streams.append(out.clone()))
    model(images())
    handle.remove()
    with torch.no_grad():
        codes = sae[1].encode(streams[0][:, 1:])
    only_codes = explain(model, images(), None, sae, Settings(Gate(mode="activation_only")), layout=model.layout())
    torch.testing.assert_close(only_codes.scores[1], codes.sum(-1))
    assert result.relevance.abs().min() > 0


@pytest.mark.parametrize("form", ["F.softmax", "three dimensions", "mha"])
@pytest.mark.parametrize("backward", ["exact", "conservative"])
def test_forms_of_attention_pools(form: str, backward: Any) -> None:
    want = explained(own_vit(pool="sdpa"), backward=backward)
    assert_same(explained(own_vit(pool=form), backward=backward), want)


class UnreadPool(nn.Module):
    """A head that runs an attention pool and throws its output away."""

    def __init__(self, model: OwnViT) -> None:
        super().__init__()
        self.pool, self.query, self.head = model.pool, model.query, model.head

    def forward(self, pooled: Tensor) -> Tensor:  # [B, C]
        self.pool(self.query.expand(len(pooled), -1, -1), pooled[:, None].expand(-1, TOKENS, -1))
        return self.head(pooled)  # type: ignore[no-any-return]


@pytest.mark.parametrize("backward", ["exact", "conservative"])
def test_a_pool_that_the_classifier_does_not_read_is_left_alone(backward: Any) -> None:
    model = own_vit()
    want = explained(model, backward=backward)
    model.head = UnreadPool(model)
    assert_same(explained(model, backward=backward), want)


def test_a_block_that_returns_no_tokens_is_refused() -> None:
    model = own_vit()
    model.layers[1].forward = lambda x: {"x": x}  # type: ignore[method-assign]
    with pytest.raises(TapeError, match=r"block 1 \(Block\) returned dict, expected the residual stream"):
        explained(model)


def test_multi_head_attention_outside_the_tower_is_left_alone() -> None:
    """A text tower's keys of its own, say, which could not be explained."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = own_vit()
            self.text = nn.MultiheadAttention(8, 2, add_bias_kv=True).double().eval()

        def forward(self, x: Tensor) -> Tensor:
            words = x.new_ones(4, 1, 8)
            out = self.tower(x)
            return out * self.text(words, words, words)[0].mean()  # type: ignore[no-any-return]

    model = Wrapped()
    result = explain(model, images(), None, {}, Settings(), layout=model.tower.layout())
    assert result.relevance.abs().min() > 0
