"""Heads that read other tokens or blocks, blocks without gradients, and small signals: every backend agrees with a
textbook TransMM, or all refuse in the same words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from explaining import agree, sae_for
from own_vit import CLASSES, GRID, IMAGES, TOKENS, WIDTH, own_vit
from torch import Tensor, nn

from fga_fast import Explainer, Explanation
from fga_fast.models.block_io import TapeError
from fga_fast.models.layout import ModelLayout

BACKENDS: Any = ("native", "composite", "reference")
TARGET = 3
Streams = Sequence[Tensor]  # what blocks hand on, each [B, N, C]


class Headed(nn.Module):
    """Three blocks and a head on any of what they hand on."""

    def __init__(self, read: Callable[[Streams, nn.Module], Tensor], width: int = WIDTH) -> None:
        super().__init__()
        self.inner, self.read = own_vit(), read
        self.embed_dim = WIDTH
        torch.manual_seed(5)
        self.head = nn.Linear(width, CLASSES).double()

    def streams(self, images: Tensor) -> list[Tensor]:
        inner = self.inner
        x = inner.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([inner.token.expand(len(x), -1, -1), x], dim=1) + inner.position
        return [x := layer(x) for layer in inner.layers]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.read(self.streams(images), self.inner.norm))  # type: ignore[no-any-return]

    def layout(self, pooling: Any = "token") -> ModelLayout:
        return ModelLayout(tuple(self.inner.layers), 1, GRID, pooling)


def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(IMAGES).double()


def textbook(model: Headed, x: Tensor, rows: dict[int, Tensor]) -> Tensor:  # block -> [N]; -> [B, P]
    """sum_l row_l (I + Cbar_l) ... (I + Cbar_0), with maps that the model's own softmax makes."""
    maps: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, _mask: Tensor | None) -> Tensor:
        maps.append((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1))
        return maps[-1] @ v

    forms = [layer.attn.form for layer in model.inner.layers]  # type: ignore[union-attr]
    for layer in model.inner.layers:
        layer.attn.form = attend  # type: ignore[union-attr, assignment]
    y = model(x)[:, TARGET].sum()
    for layer, form in zip(model.inner.layers, forms, strict=True):
        layer.attn.form = form  # type: ignore[union-attr]
    differentiated = [a for a in maps if a.requires_grad]
    gradients = torch.autograd.grad(y, differentiated, allow_unused=True)
    found = torch.zeros(len(x), TOKENS).double()
    for last, row in rows.items():
        matrix = torch.eye(TOKENS).double()
        for a, g in zip(differentiated[: last + 1], gradients, strict=False):
            matrix = matrix if g is None else matrix + (a * g).clamp(min=0).mean(1) @ matrix
        found = found + row @ matrix
    return found[:, 1:]


CLS = F.one_hot(torch.tensor(0), TOKENS).double()
MEAN = (1 - CLS) / (TOKENS - 1)
FIRST_TWO = F.pad(torch.full((2,), 0.5).double(), (1, TOKENS - 3))
HEADS: dict[str, tuple[Callable[[Streams, nn.Module], Tensor], int, dict[int, Tensor]]] = {
    "class token of the last block": (lambda x, norm: norm(x[2])[:, 0], 1, {2: CLS}),
    "class token of an earlier block": (lambda x, norm: x[0][:, 0], 1, {0: CLS}),
    "patches of an earlier block": (lambda x, norm: x[1][:, 1:].mean(1), 1, {1: MEAN}),
    "normalised patches": (lambda x, norm: norm(x[1])[:, 1:].mean(1), 1, {1: MEAN}),
    "some patches": (lambda x, norm: x[2][:, 1:3].mean(1), 1, {2: FIRST_TWO}),
    "class token beside mean": (lambda x, norm: torch.cat([x[2][:, 0], x[2][:, 1:].mean(1)], 1), 2, {2: CLS + MEAN}),
    "sum of blocks": (lambda x, norm: (0.2 * x[0] + 0.5 * x[1])[:, 0], 1, {0: CLS * 2 / 7, 1: CLS * 5 / 7}),
    "probe on all blocks": (
        lambda x, norm: torch.cat([*(norm(t)[:, 0] for t in x), norm(x[2])[:, 1:].mean(1)], 1),
        4,
        {0: CLS, 1: CLS, 2: CLS + MEAN},
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_rollout_starts_from_what_the_head_reads(name: str) -> None:
    read, vectors, rows = HEADS[name]
    model, x = Headed(read, vectors * WIDTH), images()
    want, found = textbook(model, x, rows), []
    for backend in BACKENDS:
        e = Explainer(model, layout=model.layout(), backend=backend, per_block=True)(x, TARGET)
        torch.testing.assert_close(e.relevance, want, rtol=1e-9, atol=1e-12)
        assert (e.notices == ()) == (name == "class token of the last block")
        found.append(e)
    agree(found[0], found[2], 1e-9)
    agree(found[1], found[2], 1e-9)
    together = Explainer(model, layout=model.layout(), backend="native")(x, [[TARGET, 0]] * 2)
    torch.testing.assert_close(together.relevance[:, 0], want, rtol=1e-9, atol=1e-12)
    graph = Explainer(model, layout=model.layout(), backend="native").module(x, target_mode="given")
    torch.testing.assert_close(graph(x, torch.full((2,), TARGET))["relevance"], want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
def test_starts_of_16_bit_gradients(dtype: torch.dtype) -> None:
    read, vectors, rows = HEADS["probe on all blocks"]
    model, x = Headed(read, vectors * WIDTH), images()
    want = textbook(model, x, rows)
    model, low = model.to(dtype), x.to(dtype)
    bound = 1e-5 if dtype == torch.float32 else 0.1
    for backend in BACKENDS:
        e = Explainer(model, layout=model.layout(), backend=backend)(low, TARGET)
        assert float((e.relevance - want).norm()) <= bound * float(want.norm())


def test_gates_and_features_where_several_blocks_are_read() -> None:
    read, vectors, _ = HEADS["probe on all blocks"]
    model = Headed(read, vectors * WIDTH)
    found = [
        Explainer(model, {b: sae_for(model) for b in (0, 2)} if not i else saes, layout=model.layout(), backend=backend,
                  top_features=3, per_block=True)(images(), [[TARGET, 0]] * 2)
        for saes in [{b: sae_for(model) for b in (0, 2)}] for i, backend in ((1, "native"), (2, "reference"))
    ]  # fmt: skip
    agree(found[0], found[1], 1e-9)


def test_an_sae_after_the_last_block_that_is_read_gates_nothing() -> None:
    model = Headed(HEADS["patches of an earlier block"][0])
    saes = {1: sae_for(model), 2: sae_for(model)}
    settings: Any = {"layout": model.layout(), "top_features": 2}
    for targets in (TARGET, [[TARGET, 1]] * 2):
        native, reference = (Explainer(model, saes, backend=b, **settings)(images(), targets) for b in BACKENDS[::2])
        agree(native, reference, 1e-9)
        assert not native.scores[2].any()
        assert (native.gates[2] == 1).all()


def refused(model: Headed, match: str, saes: Any = None, **settings: Any) -> None:
    found = set()
    for backend in BACKENDS:
        with pytest.raises(TapeError, match=match) as error:
            Explainer(model, saes, layout=model.layout(), backend=backend, **settings)(images(), TARGET)
        found.add(str(error.value))
    assert len(found) == 1


def test_a_head_that_reads_the_inside_of_a_block_is_refused() -> None:
    model = Headed(lambda x, norm: x[2][:, 0])
    inside: list[Tensor] = []
    model.inner.layers[1].attn.register_forward_hook(lambda _m, _i, out: inside.append(out))  # type: ignore[union-attr]
    model.read = lambda x, norm: x[2][:, 0] + inside[-1][:, 0]
    refused(model, r"read the attention inside block 1 \(Block\)")


@pytest.mark.parametrize("method", ("rollout", "input_x_gradient"))
def test_a_head_that_mixes_images_is_refused(method: Any) -> None:
    model = Headed(lambda x, norm: norm(x[2])[:, 0] - 0.5 * norm(x[2])[:, 0].mean(0))
    refused(model, "depends on other images of the batch", method=method)
    Explainer(model, layout=model.layout())(images()[:1], TARGET)
    halves = Headed(lambda x, norm: x[2][:, 0].view(2, -1, WIDTH).mean(0).repeat(2, 1))
    four = images().repeat(2, 1, 1, 1)
    for backend in BACKENDS:
        with pytest.raises(TapeError, match="depends on other images of the batch"):
            Explainer(halves, layout=halves.layout(), backend=backend, method=method)(four, TARGET)


def softmax_pool(x: Tensor) -> Tensor:
    return ((x[:, 1:] @ torch.linspace(-3, 3, WIDTH).double()).softmax(1)[..., None] * x[:, 1:]).sum(1)


@pytest.mark.parametrize("pool", (softmax_pool, lambda x: x[:, 1:].pow(8).mean(1).abs().pow(1 / 8)))
def test_a_pooling_that_weighs_tokens_is_said(pool: Callable[[Tensor], Tensor]) -> None:
    model = Headed(lambda x, norm: pool(x[2]))
    for backend in BACKENDS:
        e = Explainer(model, layout=model.layout("average"), backend=backend)(images(), TARGET)
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
            Explainer(model, layout=layout, backend=backend)(images(), TARGET)


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
        explainer = Explainer(model, saes, layout=model.layout(), backend=backend, backward=backward)
        found.append(explainer(images(), TARGET))
    agree(found[0], found[2], 1e-9)
    agree(found[1], found[2], 1e-9)


def test_classes_that_read_different_tokens_in_one_graph() -> None:
    model = Headed(lambda x, norm: x[2][:, :CLASSES].sum(-1))
    model.head = nn.Identity()  # type: ignore[assignment]
    x, explainer = images(), Explainer(model, layout=model.layout(), backend="native")
    graph = explainer.module(x, target_mode="given")
    for target in range(CLASSES):
        got = graph(x, torch.full((len(x),), target))["relevance"]
        torch.testing.assert_close(got, explainer(x, target).relevance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ("rollout", "input_x_gradient"))
@pytest.mark.parametrize("idle", range(3))
def test_a_block_that_hands_the_tokens_on_is_left_out(idle: int, method: Any) -> None:
    model = Headed(HEADS["probe on all blocks"][0], 4 * WIDTH)
    model.inner.layers[idle].forward = lambda hidden_states: hidden_states  # type: ignore[method-assign]
    saes, found = {(idle + 1) % 3: sae_for(model)}, []
    for backend in BACKENDS:
        explainer = Explainer(model, saes, layout=model.layout(), backend=backend, method=method, per_block=True)
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
    refused(model, r"block 2 \(Block\) reads what block 0 hands on")
    refused(model, r"block 2 \(Block\) reads what block 0 hands on", {1: sae_for(model)})
    found = [
        Explainer(model, layout=model.layout(), backend=b, method="input_x_gradient")(images(), TARGET)
        for b in BACKENDS
    ]
    agree(found[0], found[2], 1e-9)
    agree(found[1], found[2], 1e-9)


# -- blocks without gradients ------------------------------------------------------------------------------------------


class Cut(Headed):
    """Its blocks run as `way` says, up to block 1 or at it."""

    def __init__(self, way: str) -> None:
        super().__init__(lambda x, norm: norm(x[-1])[:, 0])
        self.way = way

    def streams(self, images: Tensor) -> list[Tensor]:
        layers, way = self.inner.layers, self.way
        with torch.inference_mode(way == "inference_mode"), torch.set_grad_enabled(way != "no_grad"):
            inner = self.inner
            x = inner.patches(images).flatten(2).transpose(1, 2)
            x = layers[0](torch.cat([inner.token.expand(len(x), -1, -1), x], dim=1) + inner.position)
        x = x.detach() if way == "detach" else x
        x = x if way == "skips" else layers[1](x)
        return [x if way == "stops" else layers[2](x)]


@pytest.mark.parametrize("way", ("no_grad", "inference_mode", "detach"))
def test_blocks_without_gradients_are_found_and_said(way: str) -> None:
    cut, whole, x = Cut(way), Cut("runs"), images()
    saes = {1: sae_for(cut)}
    for backend in BACKENDS:
        e = Explainer(cut, saes, layout=cut.layout(), backend=backend, per_block=True)(x, TARGET)
        want = Explainer(whole, saes, layout=whole.layout(), backend=backend, per_block=True, start_block=1)(x, TARGET)
        agree(dataclasses.replace(e, notices=()), want, 1e-9)
        assert "block 0 ran without gradients" in e.notices[0]
    refused(cut, r"input_x_gradient' needs the gradient .* block 0, but block 0 ran", method="input_x_gradient")
    refused(cut, r"saes\[0\]: would gate nothing at block 0, because it has no gradient", {0: sae_for(cut)})
    same = Explainer(cut, layout=cut.layout(), method="input_x_gradient", start_block=1)(x, TARGET)
    want = Explainer(whole, layout=whole.layout(), method="input_x_gradient", start_block=1)(x, TARGET)
    torch.testing.assert_close(same.relevance, want.relevance)


class Auxiliary(Cut):
    """Reads block 0, before a cut."""

    def streams(self, images: Tensor) -> list[Tensor]:
        inner = self.inner
        x = inner.patches(images).flatten(2).transpose(1, 2)
        first = inner.layers[0](torch.cat([inner.token.expand(len(x), -1, -1), x], dim=1) + inner.position)
        with torch.set_grad_enabled(self.way != "no_grad"):
            last = inner.layers[2](inner.layers[1](first.detach()))
        return [first, last]


@pytest.mark.parametrize("way", ("no_grad", "detach"))
def test_a_read_before_the_cut(way: str) -> None:
    model = Auxiliary(way)
    model.read = lambda x, norm: norm(x[0])[:, 0]
    for backend in BACKENDS:
        e = Explainer(model, layout=model.layout(), backend=backend)(images(), TARGET)
        torch.testing.assert_close(e.relevance, textbook(model, images(), {0: CLS}), rtol=1e-9, atol=1e-12)
        assert e.start_block == 0
    if way == "detach":
        model.read = lambda x, norm: norm(x[0] + x[1])[:, 0]
        refused(model, "read the output of blocks 0, 2, but gradients end before block 1")


@pytest.mark.parametrize("method", ("rollout", "input_x_gradient"))
@pytest.mark.parametrize("way", ("skips", "stops"))
def test_blocks_that_do_not_run(way: str, method: Any) -> None:
    model, x = Cut(way), images()
    found = []
    for backend in BACKENDS:
        found.append(Explainer(model, layout=model.layout(), backend=backend, per_block=True, method=method)(x, TARGET))
        agree(found[-1], found[0], 1e-9)
    if method == "rollout":
        torch.testing.assert_close(found[0].relevance, textbook(model, x, {1: CLS}), rtol=1e-9, atol=1e-12)
    assert ("block 1 did not run" if way == "skips" else "block 2 did not run") in found[0].notices[0]
    refused(model, r"saes\[\d\]: would gate nothing .* it did not run", {1 if way == "skips" else 2: sae_for(model)})


# -- small signals and errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("scale", (1e-6, 1e-12, 1e-20))
def test_small_values_keep_their_digits_in_float32(name: str, scale: float) -> None:
    read, vectors, _ = HEADS[name]
    model, x = Headed(read, vectors * WIDTH), images()
    saes = {0: sae_for(model)}

    def explain(dtype: torch.dtype, backend: Any) -> Explanation:
        low = {block: sae.to(dtype) for block, sae in saes.items()}
        explainer = Explainer(model.to(dtype), low, layout=model.layout(), backend=backend)
        return explainer(x.to(dtype), lambda y: scale * y[:, TARGET])

    want = explain(torch.float64, "reference")
    for backend in BACKENDS:
        e = explain(torch.float32, backend)
        error = e.shown.double() / scale - want.shown / scale
        varies = want.shown / scale - want.shown.mean(-1, keepdim=True) / scale
        assert float(error.norm()) <= 1e-3 * float(varies.norm())
        assert e.heatmap().amax((1, 2)).tolist() == [1.0, 1.0]
        torch.testing.assert_close(e.gates[0], want.gates[0].float(), rtol=1e-3, atol=1e-3)


def test_gates_do_not_fade_with_the_values() -> None:
    model = Headed(HEADS["class token of the last block"][0])
    explainer = Explainer(model, {0: sae_for(model)}, layout=model.layout(), backend="native")
    gates = [explainer(images(), lambda y, k=k: k * y[:, TARGET]).gates[0] for k in (1, 1e-7, 1e-14)]  # type: ignore[misc]
    torch.testing.assert_close(gates[1], gates[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(gates[2], gates[0], rtol=1e-3, atol=1e-3)


def test_saturated_probabilities_and_maps_of_zeros_are_said(caplog: pytest.LogCaptureFixture) -> None:
    model = Headed(HEADS["class token of the last block"][0]).float()
    x, layout = images().float(), model.layout()

    class Probabilities(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.model, self.factor = model, factor

        def forward(self, x: Tensor) -> Tensor:
            return (self.factor * self.model(x)).softmax(-1)

    explainer = Explainer(Probabilities(200.0), layout=layout)
    notices = explainer(x).notices
    assert "probability that rounding cannot tell from 1" in notices[0]
    explainer(x)
    assert sum("cannot tell from 1" in record.getMessage() for record in caplog.records) == 1
    assert Explainer(Probabilities(0.1), layout=layout)(x).notices == ()
    zeros = Explainer(model, layout=layout)(x, lambda y: y[:, 0] * 0)
    assert "a map is zero everywhere" in zeros.notices[0]
    assert not zeros.heatmap().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_of_the_model_say_where_they_were(backend: Any) -> None:
    model = Headed(HEADS["class token of the last block"][0])
    layer: Any = model.inner.layers[1]
    layer.mlp = nn.Linear(WIDTH + 1, WIDTH).double()
    with pytest.raises(TapeError, match=r"the forward pass failed in block 1 \(Block\) with RuntimeError: mat1 and m"):
        Explainer(model, layout=model.layout(), backend=backend)(images())

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0].view(7)

    layer.mlp = nn.Identity()
    layer.norm2.register_forward_hook(lambda _m, _i, out: Broken.apply(out))
    with pytest.raises(TapeError, match=r"the backward pass failed in block 1 \(Block\) with RuntimeError"):
        Explainer(model, layout=model.layout(), backend=backend)(images())


@pytest.mark.parametrize("size", (None, IMAGES[2:]))
@pytest.mark.parametrize("batch", (2, TOKENS))
def test_images_and_tokens_swapped_in_a_layout_are_found(size: Any, batch: int) -> None:
    model = own_vit()
    layout = dataclasses.replace(model.layout(), tokens_first=True, image_size=size)
    with pytest.raises(TapeError, match=r"block 0 \(Block\) returned .* set tokens_first=False"):
        Explainer(model, layout=layout)(images()[:1].expand(batch, -1, -1, -1))
    if size is not None:
        with pytest.raises(TapeError, match="set tokens_first=False"):
            Explainer(model, layout=layout)
    right = dataclasses.replace(model.layout(), image_size=size)
    Explainer(model, layout=right)(images()[:1].expand(batch, -1, -1, -1))
