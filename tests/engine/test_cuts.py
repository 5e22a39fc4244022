"""Blocks without gradients, blocks that do not run, wrong layouts, and errors of the model: said, or refused alike."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from explaining import agree, sae_for
from headed import BACKENDS, CLS, HEADS, TARGET, Headed, images, refused, textbook
from own_vit import IMAGES, TOKENS, WIDTH, own_vit
from torch import Tensor, nn

from fga_fast import Explainer
from fga_fast.models.block_io import TapeError


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
        e = Explainer(cut, saes, layout=cut.layout(), backend=backend, per_block=True, preset="published")(x, TARGET)
        want = Explainer(
            whole, saes, layout=whole.layout(), backend=backend, per_block=True, start_block=1, preset="published"
        )(x, TARGET)
        agree(dataclasses.replace(e, notices=()), want, 1e-9)
        assert "block 0 ran without gradients" in e.notices[0]
    refused(cut, r"input_x_gradient' needs the gradient .* block 0, but block 0 ran", method="input_x_gradient")
    refused(cut, r"saes\[0\]: would gate nothing at block 0, because it has no gradient", {0: sae_for(cut)})
    same = Explainer(cut, layout=cut.layout(), method="input_x_gradient", start_block=1, preset="published")(x, TARGET)
    want = Explainer(whole, layout=whole.layout(), method="input_x_gradient", start_block=1, preset="published")(
        x, TARGET
    )
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
        e = Explainer(model, layout=model.layout(), backend=backend, preset="published")(images(), TARGET)
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
        found.append(
            Explainer(model, layout=model.layout(), backend=backend, per_block=True, method=method, preset="published")(
                x, TARGET
            )
        )
        agree(found[-1], found[0], 1e-9)
    if method == "rollout":
        torch.testing.assert_close(found[0].relevance, textbook(model, x, {1: CLS}), rtol=1e-9, atol=1e-12)
    assert ("block 1 did not run" if way == "skips" else "block 2 did not run") in found[0].notices[0]
    refused(model, r"saes\[\d\]: would gate nothing .* it did not run", {1 if way == "skips" else 2: sae_for(model)})


@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_of_the_model_say_where_they_were(backend: Any) -> None:
    model = Headed(HEADS["class token of the last block"][0])
    layer: Any = model.inner.layers[1]
    layer.mlp = nn.Linear(WIDTH + 1, WIDTH).double()
    with pytest.raises(TapeError, match=r"the forward pass failed in block 1 \(Block\) with RuntimeError: mat1 and m"):
        Explainer(model, layout=model.layout(), backend=backend, preset="published")(images())

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
        Explainer(model, layout=model.layout(), backend=backend, preset="published")(images())


@pytest.mark.parametrize("size", (None, IMAGES[2:]))
@pytest.mark.parametrize("batch", (2, TOKENS))
def test_images_and_tokens_swapped_in_a_layout_are_found(size: Any, batch: int) -> None:
    model = own_vit()
    layout = dataclasses.replace(model.layout(), tokens_first=True, image_size=size)
    with pytest.raises(TapeError, match=r"block 0 \(Block\) returned .* set tokens_first=False"):
        Explainer(model, layout=layout, preset="published")(images()[:1].expand(batch, -1, -1, -1))
    if size is not None:
        with pytest.raises(TapeError, match="set tokens_first=False"):
            Explainer(model, layout=layout, preset="published")
    right = dataclasses.replace(model.layout(), image_size=size)
    Explainer(model, layout=right, preset="published")(images()[:1].expand(batch, -1, -1, -1))
