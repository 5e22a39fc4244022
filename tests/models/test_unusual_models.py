"""Models that do things their own way, and callers who do: explained alike, or refused by name."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from explaining import PIXELS, Build, sae_for
from torch import Tensor, nn

from fga_fast import Explainer, ModelLayout
from fga_fast.engine.tape import Tape
from fga_fast.models.find import find_layout

Output = namedtuple("Output", ("hidden", "weights"))


class Block(nn.Module):
    """A block of one's own; `attend` and `norm` may be replaced."""

    def __init__(self, width: int = 16, value_width: int | None = None) -> None:
        super().__init__()
        values = value_width or width
        self.norm, self.qk = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.v, self.out = nn.Linear(width, values), nn.Linear(values, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.attention_dtype: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm(x)
        q, k, v = (
            t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (*self.qk(u).chunk(2, -1), self.v(u))
        )  # fmt: skip
        if self.attention_dtype is not None:
            q, k, v = (t.to(self.attention_dtype) for t in (q, k, v))
        a = F.scaled_dot_product_attention(q, k, v).to(x.dtype).transpose(1, 2).flatten(2)
        x = x + self.out(a)
        return x + self.mlp(x)  # type: ignore[no-any-return]


class Model(nn.Module):
    """Patches, a class token, blocks called through `call`, a head on the class token."""

    def __init__(self, call: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None, **block: Any) -> None:
        super().__init__()
        self.embed_dim = 16
        self.patches, self.token = nn.Conv2d(3, 16, 16, 16), nn.Parameter(torch.randn(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 7, 16))
        self.blocks = nn.ModuleList(Block(**block) for _ in range(3))
        self.head, self.call = nn.Linear(16, 5), call or (lambda inner, x, position: inner(x))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        position = self.position.expand(len(x), -1, -1)
        for block in self.blocks:
            x = self.call(block, x, position)
        return self.head(x[:, 0])  # type: ignore[no-any-return]


def layout_of(model: nn.Module, **settings: Any) -> ModelLayout:
    return ModelLayout(model.blocks, 1, (2, 3), **settings)  # type: ignore[arg-type]


def relevance(model: nn.Module, images: Tensor, backend: Any = "native", **settings: Any) -> Tensor:
    settings = {"layout": layout_of(model), **settings}
    return Explainer(model, backend=backend, **settings)(images, [[1, 0], [4, 2]]).relevance


class Positioned(nn.Module):
    """A block that wants the positions first."""

    def __init__(self, inner: nn.Module, named: bool) -> None:
        super().__init__()
        self.inner, self.named = inner, named

    def forward(self, position: Tensor, hidden: Tensor) -> Any:
        x = self.inner(hidden + position)
        return Output(x, None) if self.named else x


@pytest.mark.parametrize("backend", ("native", "composite", "reference"))
def test_blocks_called_their_own_way(backend: Any) -> None:
    """Positions before tokens, keywords, named tuples out: the same numbers as for the plain call."""
    images = torch.randn(2, *PIXELS).double()
    model = Model(lambda block, x, position: block(x + position)).double().eval()
    settings: dict[str, Any] = {"start_layer": 1, "method": "input_x_gradient"}
    plain = relevance(model, images, backend)
    for named in (False, True):
        other = copy.deepcopy(model)
        other.blocks = nn.ModuleList(Positioned(block, named) for block in other.blocks)

        def call(block: nn.Module, x: Tensor, position: Tensor, named: bool = named) -> Tensor:
            out = block(position=position, hidden=x)
            return out.hidden if named else out  # type: ignore[no-any-return]

        other.call = call
        torch.testing.assert_close(relevance(other, images, backend), plain)
        # After the first block the tokens are known by identity; positions of the same shape do not confuse it.
        got = Explainer(other, backend=backend, layout=layout_of(other), **settings)(images, 1).relevance
        x = other.blocks[0](position=other.position.expand(2, -1, -1), hidden=embed(other, images))
        x = (x.hidden if named else x).detach().requires_grad_()
        y = x
        for block in other.blocks[1:]:
            y = call(block, y, other.position.expand(2, -1, -1))
        (g,) = torch.autograd.grad(other.head(y[:, 0])[:, 1].sum(), x)
        torch.testing.assert_close(got, (x * g).sum(-1)[:, 1:].detach())
        with pytest.raises(ValueError, match=r"2 tensors .* of shape"):
            Explainer(other, backend=backend, layout=layout_of(other), method="input_x_gradient")(images)


def embed(model: Any, images: Tensor) -> Tensor:
    x = model.patches(images).flatten(2).transpose(1, 2)
    return torch.cat([model.token.expand(len(x), -1, -1), x], 1)


@pytest.mark.parametrize("settings", ({}, {"method": "input_x_gradient", "backward": "conservative"}))
@pytest.mark.parametrize("kind", ("values of another width", "float32 attention", "float64 attention"))
def test_attention_of_another_shape_or_precision(kind: str, settings: dict[str, Any]) -> None:
    model = Model(value_width=24 if kind.startswith("values") else None).eval()
    if kind == "float32 attention":
        model = model.double()
    for block in model.blocks:
        block.attention_dtype = {"float32 attention": torch.float32, "float64 attention": torch.float64}.get(kind)
    images = torch.randn(2, *PIXELS).to(next(model.parameters()).dtype)
    got, want = (relevance(model, images, backend, **settings) for backend in ("native", "reference"))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_conservative_under_autocast(tiny_vit: Build, dtype: torch.dtype) -> None:
    """Autocast leaves float64 alone and takes 16-bit models as they are."""
    model, images = tiny_vit().to(dtype), torch.randn(2, *PIXELS).to(dtype)
    want = Explainer(model, backward="conservative", backend="native")(images, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = Explainer(model, backward="conservative", backend="native")(images, 1)
    assert float((got.relevance - want.relevance).norm() / want.relevance.norm()) < 0.1


def test_a_norm_that_is_changed_in_place(tiny_vit: Build) -> None:
    class Modulated(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.factor = inner, nn.Parameter(torch.randn(16))

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            y *= 1 + self.factor
            return y  # type: ignore[no-any-return]

    model, images = tiny_vit(), torch.randn(2, *PIXELS).double()
    for block in model.blocks:  # type: ignore[union-attr]
        block.norm1 = Modulated(block.norm1)
    model = model.double()
    got, want = (
        Explainer(model, backward="conservative", backend=backend)(images, 1).relevance  # type: ignore[arg-type]
        for backend in ("native", "reference")
    )
    torch.testing.assert_close(got, want)


class Looking(torch.autograd.Function):
    """An autograd function that looks at its gradient's values, which vmap does not allow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        assert grads[0].abs().max().item() >= 0
        return grads[0]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_gradients_that_do_not_batch(tiny_vit: Build, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    model, images = tiny_vit().to(dtype), torch.randn(2, *PIXELS).to(dtype)
    targets = [[0, 1, 2], [3, 3, 4]]
    want = Explainer(model, {1: sae_for(model)}, backend="native")(images, targets)
    assert caplog.text == ""
    model.head.register_forward_hook(lambda _module, _inputs, output: Looking.apply(output))  # type: ignore[union-attr,no-untyped-call]
    got = Explainer(model, backend="native")(images, targets)
    plain = Explainer(model, backend="native")(images, [0, 3])
    assert "one by one" in caplog.text
    torch.testing.assert_close(got.relevance[:, 0], plain.relevance, rtol=1e-2, atol=1e-4)
    assert want.relevance.shape == got.relevance.shape


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("backward", ("exact", "conservative"))
def test_nothing_is_kept_without_the_garbage_collector(tiny_vit: Build, backward: Any, dtype: torch.dtype) -> None:
    """The graph of an explanation is gone with it, not when the collector happens to run."""
    model, images = tiny_vit().to(dtype), torch.randn(2, *PIXELS).to(dtype)
    streams: list[weakref.ref[Tensor]] = []
    model.blocks[1].register_forward_hook(lambda _m, _i, out: streams.append(weakref.ref(out)))  # type: ignore[index,operator]
    explainer = Explainer(model, {0: sae_for(model)}, backward=backward, backend="native")
    explainer(images, 1)
    gc.collect()
    gc.disable()
    try:
        for targets in (1, [[0, 1], [2, 3]]):
            streams.clear()
            explainer(images, targets)
            assert len(streams) == 1 and streams[0]() is None
        with pytest.raises(ValueError, match="targets"):
            explainer(images, 77)
    finally:
        gc.enable()


def test_a_hook_seen_by_another_thread_while_it_is_removed(tiny_vit: Build) -> None:
    """torch calls hooks that it has copied; by then they may have lost their keywords."""
    model, images = tiny_vit(), torch.randn(2, *PIXELS)
    tape = Tape(find_layout(model), {})
    with tape.attached(images):
        hook = next(iter(model.blocks[0]._forward_pre_hooks.values()))  # type: ignore[index,union-attr]
        model(images)
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(hook(model.blocks[0], (images,))))  # type: ignore[index]
    thread.start()
    thread.join()
    assert found == [None]


def test_attention_between_the_blocks_is_refused() -> None:
    model = Model().eval()
    layout = ModelLayout([model.blocks[0], model.blocks[2]], 1, (2, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="attention runs between block 0 and block 1 of the layout"):
        Explainer(model, layout=layout, backend="native")(torch.randn(2, *PIXELS))


def test_wrong_poolings_are_noticed(caplog: pytest.LogCaptureFixture, tiny_vit: Build) -> None:
    model, images = Model().eval(), torch.randn(2, *PIXELS)
    Explainer(model, layout=layout_of(model, pooling="average", pooled=(0, 7)), backend="native")(images)
    assert "only some of the pooled tokens" in caplog.text
    pooled = tiny_vit(global_pool="map", class_token=False)
    with pytest.raises(ValueError, match="'average' pooling, but the explained values read another attention"):
        Explainer(pooled, layout=ModelLayout(pooled.blocks, 0, (2, 3), "average"), backend="native")(images)  # type: ignore[arg-type]


def test_dropout_of_the_images_is_refused(tiny_vit: Build) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = tiny_vit()

        def forward(self, x: Tensor) -> Tensor:
            return self.tower(F.dropout(x, 0.5, training=True))  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match=r"dropout 0\.5 is active"):
        Explainer(Noisy(), backend="native")(torch.randn(2, *PIXELS))


def test_a_compiled_block_is_refused() -> None:
    model = Model().eval()
    blocks = [model.blocks[0], torch.compile(model.blocks[1]), model.blocks[2]]
    with pytest.raises(ValueError, match=r"layout: blocks\[1\]"):
        Explainer(model, layout=ModelLayout(blocks, 1, (2, 3)))  # type: ignore[arg-type]


def test_a_look_at_the_maps_is_no_second_attention(tiny_vit: Build) -> None:
    model, images = tiny_vit(), torch.randn(2, *PIXELS)
    want = Explainer(model, backend="native")(images, 1).relevance

    def look(_module: nn.Module, inputs: Any) -> None:
        with torch.no_grad():
            torch.randn(2, 2, 7, 7).softmax(-1)

    model.blocks[1].attn.register_forward_pre_hook(look)  # type: ignore[index,union-attr]
    torch.testing.assert_close(Explainer(model, backend="native")(images, 1).relevance, want)


def test_a_users_function_is_not_taken_for_the_models(tiny_vit: Build) -> None:
    """Norms and activations in a target function keep their own gradient under the conservative backward pass."""
    model, images = tiny_vit().double(), torch.randn(2, *PIXELS).double()
    e = Explainer(model, method="input_x_gradient", backward="conservative", backend="native")
    parts = [e(images, k).relevance for k in range(5)]
    logits = model(images).detach()
    slope = logits / logits.norm(dim=-1, keepdim=True)  # of the norm
    want = sum(slope[:, k, None] * part for k, part in enumerate(parts))
    torch.testing.assert_close(e(images, lambda y: y.norm(dim=-1)).relevance, want)
