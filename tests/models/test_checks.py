"""Checks with layouts that leave something out, as a user's own may."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from explaining import PIXELS, Build, sae_for, where_installed
from torch import nn
from torch._subclasses import FakeTensorMode

from fga_fast import Explainer, ModelLayout, SparseAutoencoder
from fga_fast.models import checks


def own_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.embed_dim = 4  # type: ignore[assignment]
    return model


def own_layout(model: nn.Module, **settings: Any) -> ModelLayout:
    return ModelLayout(**{"blocks": tuple(model), "prefix_tokens": 1, "grid": (2, 3), **settings})  # type: ignore[arg-type]


def test_images_of_unknown_size() -> None:
    like = next(own_model().parameters())
    checks.check_images(torch.zeros(2, 3, 32, 48), 3, None, like)
    checks.check_images(torch.zeros(0, 3, 7, 9), 3, None, like)
    checks.check_images(torch.zeros(2, 3, 32, 48).contiguous(memory_format=torch.channels_last), 3, None, like)
    for shape, message in (
        ((3, 32, 48), r"images: expected shape \[B, 3, H, W\], got \[3, 32, 48\]; add a batch dimension"),
        ((2, 1, 32, 48), r"shape \[B, 3, H, W\], got \[2, 1, 32, 48\]; repeat grey images with .*in_chans=1\)"),
        ((2, 4, 32, 48), r"got \[2, 4, 32, 48\]; if the model takes 4 channels, .*Layout\(..., in_chans=4\)"),
        ((2, 32, 48, 3), r"got \[2, 32, 48, 3\]; put the channels first with images.permute\(0, 3, 1, 2\)"),
        ((2, 3, 0, 48), r"got \[2, 3, 0, 48\]"),
        ((2, 3), r"got \[2, 3\]"),
        ((1, 2, 3, 32, 48), r"got \[1, 2, 3, 32, 48\]; only models of 2-D images are explained, not of volumes"),
    ):
        with pytest.raises(ValueError, match=message):
            checks.check_images(torch.zeros(shape), 3, None, like)
    with pytest.raises(ValueError, match=r"images: expected dtype torch\.float32"):
        checks.check_images(torch.zeros(2, 3, 32, 48).double(), 3, None, like)
    with pytest.raises(ValueError, match=r"expected shape \[B, 3, 32, 48\], got \[2, 3, 48, 32\]"):
        checks.check_images(torch.zeros(2, 3, 48, 32), 3, (32, 48), like)


@pytest.mark.parametrize(
    ("images", "hint"),
    [
        (
            {"pixel_values": torch.zeros(2, 3, 8, 8)},
            r'got dict; give the tensor in it, such as images\["pixel_values"\]',
        ),
        ([torch.zeros(3, 8, 8)] * 2, r"got list; torch\.stack\(\) joins images of one size"),
        (
            (torch.zeros(2, 3, 8, 8), torch.zeros(2)),
            r"got tuple; .* a loader's batch \[images, labels\] give the first",
        ),
        (torch.zeros(2, 3, 8, 8).numpy(), "got ndarray; preprocess pictures as the model was trained"),
    ],
)
def test_images_that_are_no_tensor(images: Any, hint: str) -> None:
    with pytest.raises(TypeError, match=rf"images: expected a tensor \[B, 3, H, W\], {hint}"):
        checks.check_images(images, 3, None, next(own_model().parameters()))


def test_pixels_are_not_merely_converted() -> None:
    pixels = torch.zeros(2, 3, 32, 48, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"got torch\.uint8; preprocess them .* divide by 255, then normalise"):
        checks.check_images(pixels, 3, None, next(own_model().parameters()))


def test_images_that_look_wrong_are_noticed() -> None:
    layout, images = own_layout(own_model()), torch.randn(2, 3, 32, 48)
    assert checks.image_notices(images, layout) == checks.image_notices(images[..., :40], layout) == ()
    assert checks.image_notices(images[:0], replace(layout, grid=(3, 2))) == ()
    (pixels,) = checks.image_notices(255 * torch.rand(2, 3, 32, 48), layout)
    assert pixels.startswith("images: values go beyond 50, as pixels that were not normalised do")
    (grid,) = checks.image_notices(images, replace(layout, grid=(3, 2)))
    assert "grid of 3 x 2 over images of 32 x 48 makes patches of 10.7 x 24 pixels" in grid


def test_saes_of_unknown_width() -> None:
    model = own_model()
    like = next(model.parameters())
    wide = SparseAutoencoder(torch.ones(5, 9), None, torch.ones(9, 5), torch.zeros(5))
    checks.check_saes({0: wide, 1: sae_for(model)}, own_layout(model), like)  # the residual stream will tell
    with pytest.raises(ValueError, match=r"saes\[0\]: the SAE reads a residual stream of width 5, .* has width 4"):
        checks.check_saes({0: wide}, own_layout(model, d_model=4), like)
    with pytest.raises(ValueError, match="expected blocks 0 to 1 as keys, got 2"):
        checks.check_saes({2: wide}, own_layout(model), like)


def test_masked_classes_are_named_as_a_cause() -> None:
    logits = torch.tensor([[1.0, -torch.inf]])
    with pytest.raises(ValueError, match=r"the logits came out NaN or Inf .* if it masks classes by -Inf, wrap it"):
        checks.check_finite(logits, "the logits", own_model(), torch.zeros(1, 3, 8, 8))


def test_weights_where_the_tower_is_not_known() -> None:
    model = own_model()
    layout = own_layout(model)
    checks.check_weights(model, layout)
    assert [name for name, _ in checks.weights_of(model, layout)] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    whole = nn.ModuleDict({"tower": model, "text": nn.Linear(2, 2).double()})
    checks.check_weights(whole, own_layout(model, tower=model))  # another part may have another dtype
    with pytest.raises(ValueError, match=r"model: weight 'text.weight' of the tower is torch.float64"):
        checks.check_weights(whole, layout)
    with FakeTensorMode():
        model[1] = nn.Linear(4, 4, device="cuda:1")
    with pytest.raises(ValueError, match=r"'1.weight' is on cuda:1, others on cpu; .* without device_map"):
        checks.check_weights(model, layout)
    none = nn.Sequential(nn.Identity())
    with pytest.raises(ValueError, match="model: Sequential has no weights"):
        checks.check_weights(none, own_layout(none))


def test_weights_without_values_are_refused() -> None:
    """accelerate keeps offloaded weights on meta between calls; `model.to()` or images on meta would not help."""
    offload = where_installed("accelerate").cpu_offload
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    offload(model, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"'0.weight' holds no values.*remove_hook_from_module"):
        checks.check_weights(model, own_layout(model))


@pytest.mark.parametrize("when", ("before", "after"))
def test_weights_that_were_offloaded(when: str, tiny_vit: Build) -> None:
    model = tiny_vit()
    explainer = None if when == "before" else Explainer(model, preset="published")
    model.blocks[1].to("meta") if when == "before" else model.to("meta")
    with pytest.raises(ValueError, match=r"weight '.*' holds no values, .* meta device. If accelerate .* device_map"):
        (explainer or Explainer(model, preset="published"))(torch.randn(1, *PIXELS))
