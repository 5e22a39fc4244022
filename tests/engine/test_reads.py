"""Heads that read other tokens or blocks: every backend agrees with a textbook TransMM, or all refuse alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from explaining import agree, sae_for
from headed import BACKENDS, HEADS, TARGET, Headed, Streams, images, refused, textbook
from own_vit import CLASSES, GRID, TOKENS, WIDTH
from torch import Tensor, nn

from fga_fast import Explainer
from fga_fast.models.block_io import TapeError
from fga_fast.models.layout import ModelLayout


@pytest.mark.parametrize("name", HEADS)
def test_the_rollout_starts_from_what_the_head_reads(name: str) -> None:
    read, vectors, rows = HEADS[name]
    model, x = Headed(read, vectors * WIDTH), images()
    want, found = textbook(model, x, rows), []
    for backend in BACKENDS:
        e = Explainer(model, layout=model.layout(), backend=backend, per_block=True, preset="published")(x, TARGET)
        torch.testing.assert_close(e.relevance, want, rtol=1e-9, atol=1e-12)
        assert (e.notices == ()) == (name == "class token of the last block")
        found.append(e)
    agree(found[0], found[2], 1e-9)
    agree(found[1], found[2], 1e-9)
    together = Explainer(model, layout=model.layout(), backend="native", preset="published")(x, [[TARGET, 0]] * 2)
    torch.testing.assert_close(together.relevance[:, 0], want, rtol=1e-9, atol=1e-12)
    graph = Explainer(model, layout=model.layout(), backend="native", preset="published").module(x, target_mode="given")
    torch.testing.assert_close(graph(x, torch.full((2,), TARGET))["relevance"], want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
def test_starts_of_16_bit_gradients(dtype: torch.dtype) -> None:
    read, vectors, rows = HEADS["probe on all blocks"]
    model, x = Headed(read, vectors * WIDTH), images()
    want = textbook(model, x, rows)
    model, low = model.to(dtype), x.to(dtype)
    bound = 1e-5 if dtype == torch.float32 else 0.1
    for backend in BACKENDS:
        e = Explainer(model, layout=model.layout(), backend=backend, preset="published")(low, TARGET)
        assert float((e.relevance - want).norm()) <= bound * float(want.norm())


def test_gates_and_features_where_several_blocks_are_read() -> None:
    read, vectors, _ = HEADS["probe on all blocks"]
    model = Headed(read, vectors * WIDTH)
    saes, settings = {b: sae_for(model) for b in (0, 2)}, {"top_features": 3, "per_block": True}
    native, reference = (
        Explainer(model, saes, layout=model.layout(), backend=backend, **settings, preset="published")(
            images(), [[TARGET, 0]] * 2
        )  # type: ignore[arg-type]
        for backend in BACKENDS[::2]
    )
    agree(native, reference, 1e-9)


def test_an_sae_after_the_last_block_that_is_read_gates_nothing() -> None:
    model = Headed(HEADS["patches of an earlier block"][0])
    saes = {1: sae_for(model), 2: sae_for(model)}
    settings: Any = {"layout": model.layout(), "top_features": 2}
    for targets in (TARGET, [[TARGET, 1]] * 2):
        native, reference = (
            Explainer(model, saes, backend=b, **settings, preset="published")(images(), targets) for b in BACKENDS[::2]
        )
        agree(native, reference, 1e-9)
        assert not native.scores[2].any()
        assert (native.gates[2] == 1).all()


def test_a_head_that_reads_the_inside_of_a_block_is_refused() -> None:
    model = Headed(lambda x, norm: x[2][:, 0])
    inside: list[Tensor] = []
    model.inner.layers[1].attn.register_forward_hook(lambda _m, _i, out: inside.append(out))  # type: ignore[union-attr]
    model.read = lambda x, norm: x[2][:, 0] + inside[-1][:, 0]
    refused(model, r"read the attention inside block 1 \(Block\)")


@pytest.mark.parametrize("method", ("rollout", "input_x_gradient", "block_x_gradient"))
def test_a_head_that_mixes_images_is_refused(method: Any) -> None:
    model = Headed(lambda x, norm: norm(x[2])[:, 0] - 0.5 * norm(x[2])[:, 0].mean(0))
    refused(model, "depends on other images of the batch", method=method)
    Explainer(model, layout=model.layout(), preset="published")(images()[:1], TARGET)
    halves = Headed(lambda x, norm: x[2][:, 0].view(2, -1, WIDTH).mean(0).repeat(2, 1))
    four = images().repeat(2, 1, 1, 1)
    for backend in BACKENDS:
        with pytest.raises(TapeError, match="depends on other images of the batch"):
            Explainer(halves, layout=halves.layout(), backend=backend, method=method, preset="published")(four, TARGET)


def softmax_pool(x: Tensor) -> Tensor:
    return ((x[:, 1:] @ torch.linspace(-3, 3, WIDTH).double()).softmax(1)[..., None] * x[:, 1:]).sum(1)


@pytest.mark.parametrize("pool", (softmax_pool, lambda x: x[:, 1:].pow(8).mean(1).abs().pow(1 / 8)))
def test_a_pooling_that_weighs_tokens_is_said(pool: Callable[[Tensor], Tensor]) -> None:
    model = Headed(lambda x, norm: pool(x[2]))
    for backend in BACKENDS:
        e = Explainer(model, layout=model.layout("average"), backend=backend, preset="published")(images(), TARGET)
        assert [notice for notice in e.notices if "the head weighs the tokens 1 to 6" in notice]


def attended(x: Tensor) -> Tensor:  # [B, N, C] -> [B, C]
    tokens = x.unflatten(-1, (4, -1)).transpose(1, 2)  # [B, H, N, D]
    query = torch.ones_like(tokens[:, :, :1])
    return F.scaled_dot_product_attention(query, tokens, tokens).transpose(1, 2).flatten(1)


POOLED_OTHERWISE: dict[str, tuple[Callable[[Streams, nn.Module], Tensor], str]] = {
    "added": (lambda x, norm: attended(x[2]) + x[2][:, 0], "the attention pool and, beside it, what block 2 hands on"),
    "gated": (lambda x, norm: attended(x[2]) * x[0][:, 0], "the attention pool and, beside it, what block 0 hands on"),
    "earlier": (lambda x, norm: attended(x[1]), "pool reads the output of block 1, expected"),
    "mixed": (lambda x, norm: attended(x[1] + x[2]), "pool reads the output of blocks 1, 2"),
}


@pytest.mark.parametrize("name", POOLED_OTHERWISE)
def test_reads_beside_a_pool_and_pools_of_other_blocks_are_refused(name: str) -> None:
    read, message = POOLED_OTHERWISE[name]
    model = Headed(read)
    layout = ModelLayout(tuple(model.inner.layers), 1, GRID, "attention", (0, TOKENS))
    for backend in BACKENDS:
        with pytest.raises(TapeError, match=message):
            Explainer(model, layout=layout, backend=backend, preset="published")(images(), TARGET)


class Passing(torch.autograd.Function):
    """Autograd gives it zeros for a gradient that does not arrive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 1.0


def scaled(_module: nn.Module, _inputs: Any, out: Tensor) -> None:
    if out.requires_grad:
        out.register_hook(lambda g: g * 1.0)


@pytest.mark.parametrize("backward", ("exact", "conservative"))
def test_several_reads_with_functions_and_hooks_between(backward: Any) -> None:
    model = Headed(HEADS["probe on all blocks"][0], 4 * WIDTH)
    for layer in model.inner.layers:
        layer.norm2.register_forward_hook(lambda _m, _i, out: Passing.apply(out))  # type: ignore[union-attr]
        layer.mlp.register_forward_hook(scaled)  # type: ignore[union-attr]
    saes, found = {1: sae_for(model)}, []
    for backend in BACKENDS:
        explainer = Explainer(
            model, saes, layout=model.layout(), backend=backend, backward=backward, preset="published"
        )
        found.append(explainer(images(), TARGET))
    agree(found[0], found[2], 1e-9)
    agree(found[1], found[2], 1e-9)


def test_classes_that_read_different_tokens_in_one_graph() -> None:
    model = Headed(lambda x, norm: x[2][:, :CLASSES].sum(-1))
    model.head = nn.Identity()  # type: ignore[assignment]
    x, explainer = images(), Explainer(model, layout=model.layout(), backend="native", preset="published")
    graph = explainer.module(x, target_mode="given")
    for target in range(CLASSES):
        got = graph(x, torch.full((len(x),), target))["relevance"]
        torch.testing.assert_close(got, explainer(x, target).relevance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ("rollout", "input_x_gradient", "block_x_gradient"))
@pytest.mark.parametrize("idle", range(3))
def test_a_block_that_hands_the_tokens_on_is_left_out(idle: int, method: Any) -> None:
    model = Headed(HEADS["probe on all blocks"][0], 4 * WIDTH)
    model.inner.layers[idle].forward = lambda hidden_states: hidden_states  # type: ignore[method-assign]
    saes, found = {(idle + 1) % 3: sae_for(model)}, []
    for backend in BACKENDS:
        explainer = Explainer(
            model, saes, layout=model.layout(), backend=backend, method=method, per_block=True, preset="published"
        )
        found.append(explainer(images(), TARGET))
    agree(found[0], found[2], 1e-9)
    agree(found[1], found[2], 1e-9)
    assert f"block {idle} did not run, or handed" in found[0].notices[0]
    refused(model, rf"saes\[{idle}\]: would gate nothing .* handed the tokens on", {idle: sae_for(model)})


class Skipping(Headed):
    """The last block also reads what the first one handed on."""

    def streams(self, images: Tensor) -> list[Tensor]:
        inner = self.inner
        x = inner.patches(images).flatten(2).transpose(1, 2)
        first = inner.layers[0](torch.cat([inner.token.expand(len(x), -1, -1), x], dim=1) + inner.position)
        return [first, second := inner.layers[1](first), inner.layers[2](second + 0.5 * first)]


def test_a_skip_past_blocks_is_refused() -> None:
    model = Skipping(lambda x, norm: norm(x[2])[:, 0])
    for method in ("rollout", "block_x_gradient"):
        refused(model, r"block 2 \(Block\) reads what block 0 hands on", method=method)
        refused(model, r"block 2 \(Block\) reads what block 0 hands on", {1: sae_for(model)}, method=method)
    found = [
        Explainer(model, layout=model.layout(), backend=b, method="input_x_gradient", preset="published")(
            images(), TARGET
        )
        for b in BACKENDS
    ]
    agree(found[0], found[2], 1e-9)
    agree(found[1], found[2], 1e-9)
