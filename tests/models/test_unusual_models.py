"""Models and callers that do things in their own way: explained alike, or refused by name."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref
from collections import namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from explaining import PIXELS, Build, sae_for, where_installed
from own_vit import GRID, IMAGES, Attend, OwnViT, own_vit
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fga_fast import Explainer, ModelLayout
from fga_fast.engine.tape import Tape
from fga_fast.models.block_io import TapeError
from fga_fast.models.find import find_layout

Output = namedtuple("Output", ("hidden", "weights"))
sdpa = F.scaled_dot_product_attention


def relevance(model: OwnViT, images: Tensor, backend: Any, targets: Any = ((1, 0), (4, 2)), **settings: Any) -> Tensor:
    return Explainer(model, backend=backend, layout=model.layout(), **settings, preset="published")(
        images, targets
    ).relevance


class Positioned(nn.Module):
    """A block that wants the positions first."""

    def __init__(self, inner: nn.Module, named: bool) -> None:
        super().__init__()
        self.inner, self.named = inner, named

    def forward(self, position: Tensor, hidden: Tensor) -> Any:
        x = self.inner(hidden + position)
        return Output(x, None) if self.named else x


@pytest.mark.parametrize("named", (False, True))
@pytest.mark.parametrize("backend", ("native", "composite", "reference"))
def test_blocks_called_their_own_way(backend: Any, named: bool) -> None:
    """Positions before tokens, keywords, named tuples out: the same numbers as for the plain call."""
    images = torch.randn(IMAGES).double()
    model = own_vit(call=lambda block, x, position: block(x + position))
    plain = relevance(model, images, backend)

    def call(block: nn.Module, x: Tensor, position: Tensor) -> Any:
        return block(position=position, hidden=x)

    model.layers, model.call = nn.ModuleList(Positioned(block, named) for block in model.layers), call
    torch.testing.assert_close(relevance(model, images, backend), plain)
    with pytest.raises(ValueError, match=r"2 tensors .* of shape"):
        relevance(model, images, backend, method="input_x_gradient")
    # After the first block the tokens are known by identity; positions of the same shape do not confuse it.
    got = relevance(model, images, backend, 1, start_block=1, method="input_x_gradient")
    outputs: list[Any] = []
    handle = model.layers[0].register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    model(images)
    handle.remove()
    x = y = (outputs[0].hidden if named else outputs[0]).detach().requires_grad_()
    for block in model.layers[1:]:
        out = call(block, y, model.position.expand(2, -1, -1))
        y = out.hidden if named else out
    (g,) = torch.autograd.grad(model.head(model.norm(y)[:, 0])[:, 1].sum(), x)
    torch.testing.assert_close(got, (x * g).sum(-1)[:, 1:].detach())


ATTENTION: dict[str, tuple[torch.dtype, Attend]] = {
    "values of another width": (
        torch.float32, lambda q, k, v, _: sdpa(q, k, torch.cat([v, v[..., :2]], -1))[..., : v.shape[-1]]
    ),
    "float32 attention": (torch.float64, lambda q, k, v, _: sdpa(q.float(), k.float(), v.float()).double()),
    "float64 attention": (torch.float32, lambda q, k, v, _: sdpa(q.double(), k.double(), v.double()).float()),
}  # fmt: skip


@pytest.mark.parametrize("settings", ({}, {"method": "input_x_gradient", "backward": "conservative"}))
@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_of_another_shape_or_precision(kind: str, settings: dict[str, Any]) -> None:
    dtype, attend = ATTENTION[kind]
    model, images = own_vit(attend).to(dtype), torch.randn(IMAGES).to(dtype)
    got, want = (relevance(model, images, backend, **settings) for backend in ("native", "reference"))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_conservative_under_autocast(tiny_vit: Build, dtype: torch.dtype) -> None:
    """Autocast leaves float64 alone and takes 16-bit models as they are."""
    model, images = tiny_vit().to(dtype), torch.randn(2, *PIXELS).to(dtype)
    want = Explainer(model, backward="conservative", backend="native", preset="published")(images, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = Explainer(model, backward="conservative", backend="native", preset="published")(images, 1)
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
        Explainer(model, backward="conservative", backend=backend, preset="published")(images, 1).relevance  # type: ignore[arg-type]
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
    want = Explainer(model, {1: sae_for(model)}, backend="native", preset="published")(images, targets)
    assert caplog.text == ""
    model.head.register_forward_hook(lambda _module, _inputs, output: Looking.apply(output))  # type: ignore[union-attr,no-untyped-call]
    got = Explainer(model, backend="native", preset="published")(images, targets)
    plain = Explainer(model, backend="native", preset="published")(images, [0, 3])
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
    explainer = Explainer(model, {0: sae_for(model)}, backward=backward, backend="native", preset="published")
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
    model = own_vit()
    layout = ModelLayout([model.layers[0], model.layers[2]], 1, GRID)
    with pytest.raises(ValueError, match="attention runs between block 0 and block 1 of the layout"):
        Explainer(model, layout=layout, backend="native", preset="published")(torch.randn(IMAGES).double())


def test_wrong_poolings_are_noticed(caplog: pytest.LogCaptureFixture, tiny_vit: Build) -> None:
    model = own_vit()
    layout = dataclasses.replace(model.layout(), pooling="average", pooled=(0, 7))
    Explainer(model, layout=layout, backend="native", preset="published")(torch.randn(IMAGES).double())
    assert "read 1 of the 7 tokens that block 2 hands on, from 0 to 0, not as the layout says" in caplog.text
    pooled = tiny_vit(global_pool="map", class_token=False)
    layout = ModelLayout(pooled.blocks, 0, (2, 3), "average")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'average' pooling, but the explained values read another attention"):
        Explainer(pooled, layout=layout, backend="native", preset="published")(torch.randn(2, *PIXELS))


def test_dropout_of_the_images_is_refused(tiny_vit: Build) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = tiny_vit()

        def forward(self, x: Tensor) -> Tensor:
            return self.tower(F.dropout(x, 0.5, training=True))  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match=r"dropout 0\.5 is active"):
        Explainer(Noisy(), backend="native", preset="published")(torch.randn(2, *PIXELS))


def test_a_compiled_block_is_refused() -> None:
    model = own_vit()
    first, second, third = model.layers
    with pytest.raises(ValueError, match=r"layout: blocks\[1\]"):
        Explainer(model, layout=ModelLayout([first, torch.compile(second), third], 1, GRID), preset="published")  # type: ignore[list-item]


def test_a_look_at_the_maps_is_no_second_attention(tiny_vit: Build) -> None:
    model, images = tiny_vit(), torch.randn(2, *PIXELS)
    want = Explainer(model, backend="native", preset="published")(images, 1).relevance

    def look(_module: nn.Module, inputs: Any) -> None:
        with torch.no_grad():
            torch.randn(2, 2, 7, 7).softmax(-1)

    model.blocks[1].attn.register_forward_pre_hook(look)  # type: ignore[index,union-attr]
    torch.testing.assert_close(Explainer(model, backend="native", preset="published")(images, 1).relevance, want)


def test_a_users_function_is_not_taken_for_the_models(tiny_vit: Build) -> None:
    """Norms and activations in a target function keep their own gradient under the conservative backward pass."""
    model, images = tiny_vit().double(), torch.randn(2, *PIXELS).double()
    e = Explainer(model, method="input_x_gradient", backward="conservative", backend="native", preset="published")
    parts = [e(images, k).relevance for k in range(5)]
    logits = model(images).detach()
    slope = logits / logits.norm(dim=-1, keepdim=True)  # of the norm
    want = sum(slope[:, k, None] * part for k, part in enumerate(parts))
    torch.testing.assert_close(e(images, lambda y: y.norm(dim=-1)).relevance, want)


@pytest.mark.parametrize("backend", ("native", "reference"))
@pytest.mark.parametrize(
    ("reentrant", "message"),
    [
        (False, "CheckpointError: .*blocks under torch.utils.checkpoint run twice; call them directly"),
        (True, "no gradient to the tower; .* not inside an autograd.Function or torch.utils.checkpoint"),
    ],
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointing_in_a_users_model_is_refused(backend: Any, reentrant: bool, message: str) -> None:
    """That of the libraries is found before anything runs; a user's own shows in the forward or backward pass."""
    model = own_vit(call=lambda block, x, _: checkpoint(block, x, use_reentrant=reentrant))
    with pytest.raises(TapeError, match=message):
        relevance(model, torch.randn(IMAGES).double(), backend)


def test_random_numbers_are_refused() -> None:
    """Shuffled patches would get each other's relevance. Own generators, and numbers that only may drop, are kept."""
    images, plain = torch.randn(IMAGES).double(), own_vit()

    def noisy(block: nn.Module, x: Tensor, _position: Tensor) -> Tensor:
        return block(x + torch.rand(x.shape[-1]))  # type: ignore[no-any-return]

    for backend in ("native", "reference"):
        with pytest.raises(ValueError, match=r"the part before block 0 draws random numbers \(rand\).* switch off"):
            relevance(own_vit(call=noisy), images, backend)

    def quiet(block: nn.Module, x: Tensor, _position: Tensor) -> Tensor:
        torch.randn(3, generator=torch.Generator())
        return block(x) if torch.rand([]) > -1 else x  # type: ignore[no-any-return]

    torch.testing.assert_close(relevance(own_vit(call=quiet), images, "native"), relevance(plain, images, "native"))


def masked_autoencoder(**settings: Any) -> tuple[nn.Module, nn.Module]:
    """transformers' ViTMAEModel, and the ViTModel with the same weights."""
    transformers = pytest.importorskip("transformers")
    size = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = transformers.ViTMAEModel(transformers.ViTMAEConfig(**size, intermediate_size=32, **settings))
    plain = transformers.ViTModel(transformers.ViTConfig(**size, intermediate_size=32), add_pooling_layer=False)
    plain.load_state_dict(tower.state_dict())
    return tower.eval(), plain.eval()


class FirstToken(nn.Module):
    def __init__(self, tower: nn.Module, **settings: Any) -> None:
        super().__init__()
        self.tower, self.settings = tower, settings

    def forward(self, images: Tensor) -> Tensor:
        return self.tower(images, **self.settings).last_hidden_state[:, 0]  # type: ignore[no-any-return]


def test_a_masked_autoencoder() -> None:
    """Its patches are in their places only with a noise that says so; the remedy of its refusal gives the same map."""
    tower, plain = masked_autoencoder(mask_ratio=0.0)
    images, layout = torch.randn(2, 3, 32, 32), ModelLayout(tower.layers, prefix_tokens=1, grid=(4, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"draws random numbers \(rand\)"):
        Explainer(FirstToken(tower), layout=layout, preset="published")(images, 3)
    ordered = FirstToken(tower, noise=torch.arange(16.0).repeat(2, 1))
    got = Explainer(ordered, layout=layout, preset="published")(images, 3).relevance
    torch.testing.assert_close(got, Explainer(FirstToken(plain), preset="published")(images, 3).relevance)


class Described(Tensor):
    """A tensor with more to say, such as MONAI's MetaTensor."""


@pytest.mark.parametrize("backend", ("native", "reference"))
def test_images_of_a_subclass_of_tensor(tiny_vit: Build, backend: Any) -> None:
    model, images = tiny_vit(), torch.randn(2, *PIXELS)
    explainer = Explainer(model, {1: sae_for(model)}, backend=backend, preset="published")
    got, want = explainer(images.as_subclass(Described), 1), explainer(images, 1)
    assert torch.equal(got.relevance, want.relevance)
    assert {type(value) for value in (got.relevance, got.logits, got.targets, got.scores[1])} == {Tensor}


def test_wrappers_that_train_on_several_devices(tiny_vit: Build) -> None:
    model, images = tiny_vit(), torch.randn(2, *PIXELS)
    parallel = nn.DataParallel(model)
    torch.testing.assert_close(
        Explainer(parallel, preset="published")(images, 1).relevance,
        Explainer(model, preset="published")(images, 1).relevance,
    )
    parallel.device_ids = [0, 1]
    with pytest.raises(ValueError, match=r"DataParallel cannot be explained: .* threads.* model.module"):
        Explainer(parallel, preset="published")


def monai_vit() -> Any:
    nets = where_installed("monai.networks.nets")
    settings = {"spatial_dims": 2, "classification": True, "num_classes": 3}
    return nets.ViT(1, (32, 32), (8, 8), hidden_size=32, mlp_dim=64, num_layers=2, num_heads=2, **settings).eval()


def test_monai() -> None:
    """Two-dimensional, of one channel, with a tuple as output: each of the three is said, and then it works."""
    model, images = monai_vit(), where_installed("monai.data").MetaTensor(torch.randn(2, 1, 32, 32))
    wrapped = First(model)
    with pytest.raises(ValueError, match=r"images: expected shape \[B, 3, H, W\].*in_chans=1"):
        Explainer(wrapped, layout=ModelLayout(model.blocks, 1, (4, 4)), preset="published")(images)
    layout = ModelLayout(model.blocks, 1, (4, 4), in_chans=1)
    with pytest.raises(ValueError, match=r"got tuple of \[2, 3\], list; wrap it"):
        Explainer(model, layout=layout, preset="published")(images)
    got, want = (
        Explainer(wrapped, layout=layout, backend=backend, preset="published")(images, 2)
        for backend in ("native", "reference")
    )
    torch.testing.assert_close(got.relevance, want.relevance, rtol=1e-4, atol=1e-6)
    assert type(got.relevance) is Tensor
    with pytest.raises(ValueError, match=r"got \[2, 1, 8, 32, 32\]; only models of 2-D images are explained"):
        Explainer(wrapped, layout=layout, preset="published")(torch.randn(2, 1, 8, 32, 32))


class First(nn.Module):
    """The first entry of what a model returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)[0]  # type: ignore[no-any-return]
