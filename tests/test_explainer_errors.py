"""Every kind of bad input to an Explainer, each with its message."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from explaining import PIXELS, Build, sae_for
from torch import Tensor, nn

from fga_fast import Explainer, Gate, SparseAutoencoder
from fga_fast.models.find import find_layout

BAD_IMAGES: list[tuple[Any, str]] = [
    (torch.zeros(3, 32, 48), r"images: expected shape \[B, 3, 32, 48\], got \[3, 32, 48\]; add a batch dimension"),
    (torch.zeros(1, 1, 32, 48), r"images: expected shape .* got \[1, 1, 32, 48\]"),
    (torch.zeros(1, 3, 32, 32), "images: VisionTransformer takes images of 32 x 48 only, got 32 x 32; .*dynamic_img"),
    (torch.zeros(1, 3, 32, 48).double(), "images: expected dtype torch.float32 like the model, got torch.float64"),
    (torch.zeros(1, 3, 32, 48, dtype=torch.uint8), "images: expected dtype torch.float32"),
    (torch.zeros(1, 3, 32, 48, device="meta"), "images: expected device cpu like the model, got meta"),
    (torch.full((1, 3, 32, 48), float("nan")), "images: contain NaN or Inf"),
    (torch.full((1, 3, 32, 48), float("inf")), "images: contain NaN or Inf"),
    ([[1.0]], "images: expected a tensor"),
]


@pytest.mark.parametrize("backend", ("native", "reference"))
@pytest.mark.parametrize(("images", "message"), BAD_IMAGES, ids=range(len(BAD_IMAGES)))
def test_bad_images(images: Any, message: str, backend: Any, tiny_vit: Build) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Explainer(tiny_vit(), backend=backend, preset="published")(images)


@pytest.mark.parametrize("backend", ("native", "reference"))
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_bad_weights_are_named(value: float, backend: Any, tiny_vit: Build) -> None:
    model = tiny_vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[3, 2] = value  # type: ignore[index,union-attr]
    with pytest.raises(ValueError, match=r"model: weight 'blocks.1.mlp.fc1.weight' contains NaN or Inf"):
        Explainer(model, backend=backend, preset="published")(torch.randn(1, *PIXELS))


def test_weights_beyond_float16_are_said(tiny_vit: Build) -> None:
    model = tiny_vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[3, 2] = 1e6  # type: ignore[index,union-attr]
    with pytest.raises(ValueError, match=r"fc1\.weight' contains NaN or Inf; .* beyond 65504, where float16 ends"):
        Explainer(model.half(), preset="published")(torch.randn(1, *PIXELS).half())


def test_images_that_the_patches_do_not_fill(tiny_vit: Build) -> None:
    explainer = Explainer(tiny_vit(dynamic_img_size=True), preset="published")
    assert explainer(torch.randn(1, 3, 48, 64)).grid == (3, 4)
    with pytest.raises(ValueError, match=r"images: 40 x 64 pixels are no whole number of 16 x 16 patches .*; resize"):
        explainer(torch.randn(1, 3, 40, 64))


def test_a_model_that_resizes_its_images(tiny_vit: Build) -> None:
    class Resizing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = tiny_vit()

        def forward(self, x: Tensor) -> Tensor:
            return self.tower(nn.functional.interpolate(x, (32, 48)))  # type: ignore[no-any-return]

    model, images = Resizing(), torch.randn(2, 3, 64, 96)
    with pytest.raises(ValueError, match=r"32 x 48 only, got 64 x 96; .* if the model resizes .* image_size=None\)"):
        Explainer(model, preset="published")(images)
    found = Explainer(model, layout=replace(find_layout(model), image_size=None), preset="published")(images, 2)
    want = Explainer(model.tower, preset="published")(nn.functional.interpolate(images, (32, 48)), 2)
    torch.testing.assert_close(found.relevance, want.relevance)
    assert found.heatmap().shape == (2, 64, 96)


def test_images_are_looked_at_once(tiny_vit: Build, caplog: pytest.LogCaptureFixture) -> None:
    explainer, pixels = Explainer(tiny_vit(), preset="published"), 255 * torch.rand(1, *PIXELS)
    explainer(pixels)
    explainer(pixels)
    assert [message for message in caplog.messages if "not normalised" in message] == caplog.messages[:1]


def test_overflow_is_said(tiny_vit: Build) -> None:
    with pytest.raises(ValueError, match=r"although images and weights are finite: an overflow in torch.float16"):
        model = tiny_vit().half()
        Explainer(model, backend="native", preset="published")(torch.full((1, *PIXELS), 6e4, dtype=torch.float16))


def test_bad_saes(tiny_vit: Build) -> None:
    model = tiny_vit()
    width = int(model.embed_dim)  # type: ignore[arg-type]
    narrow = SparseAutoencoder(torch.ones(width - 1, 9), None, torch.ones(9, width - 1), torch.zeros(width - 1))
    for saes, message in (
        ({1: narrow}, f"width {width - 1}, the model's has width {width}"),
        ({3: sae_for(model)}, "expected blocks 0 to 2 as keys, got 3"),
        ({-1: sae_for(model)}, "as keys, got -1"),
        ({"1": sae_for(model)}, "as keys, got '1'"),
        ({1: sae_for(model).double()}, r"saes\[1\]: is torch.float64 for a model of torch.float32"),
        ({1: sae_for(model).to("meta")}, r"saes\[1\]: is on meta, the model on cpu"),
        ({1: nn.Linear(2, 2)}, "expected a SparseAutoencoder, got Linear"),
        ([sae_for(model)], "saes: expected a mapping from block to SparseAutoencoder, got list"),
        ({1: sae_for(model), "2": sae_for(model)}, "as keys, got '2'"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            Explainer(model, saes, preset="published")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"W_dec.*NaN"):
        SparseAutoencoder(torch.ones(2, 3), None, torch.full((3, 2), float("nan")), torch.zeros(2))


@pytest.mark.parametrize("backend", ("native", "reference"))
def test_bad_targets(backend: Any, tiny_vit: Build) -> None:
    explainer, images = Explainer(tiny_vit(), backend=backend, preset="published"), torch.randn(2, *PIXELS)
    for targets, message in (
        (5, "targets: expected classes 0 to 4, got"),
        (-1, "targets: expected classes 0 to 4, got"),
        (torch.tensor([0, 7]), "targets: expected classes 0 to 4"),
        (torch.tensor([0, 1, 2]), r"targets: expected one class an image, shape \[2\], got \[3\]"),
        (torch.zeros(3, 2, dtype=torch.int64), r"got \[3, 2\]"),
        (torch.tensor([0.0, 1.0]), "targets: expected integer class indices, got dtype torch.float32"),
        (torch.tensor([True, False]), "got dtype torch.bool"),
        ({"cat": 1}, "targets: expected None, an int or integers"),
        ("3", "targets: got the class name '3', but the model's classes have no names"),
        ([[0], [1, 2]], "targets: expected an int or a flat list of ints"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            explainer(images, targets)  # type: ignore[arg-type]


def test_bad_settings(tiny_vit: Build) -> None:
    model = tiny_vit()
    for settings, message in (
        ({"method": "lrp"}, "method: expected one of 'rollout', 'input_x_gradient', 'block_x_gradient', got 'lrp'"),
        ({"backward": "lrp"}, "backward: expected one of 'exact', 'conservative', got 'lrp'"),
        ({"start_block": 3}, r"start_block: expected 0 to 2 \(blocks\), got 3"),
        ({"start_block": True}, "start_block: expected an int, got bool"),
        ({"start_block": 2, "saes": {1: sae_for(model)}}, r"saes\[1\]: would gate nothing, since start_block=2"),
        ({"target_chunk": 0}, "target_chunk: expected at least 1, got 0"),
        ({"signed": 1}, "signed: expected True or False, got 1"),
        ({"layout": "timm"}, "layout: expected a ModelLayout, got str"),
        ({"layout": find_layout(tiny_vit())}, r"layout: blocks\[0\] \(Block\) is no module inside the model"),
        ({"backend": "fast"}, "backend: expected one of 'auto', 'native', .*, got 'fast'"),
        ({"top_features": 41, "saes": {1: sae_for(model)}}, "top_features: expected 0 to 40"),
        ({"top_features": 2}, "top_features: got 2, but there are no SAEs"),
        ({"top_features": 2.5}, "top_features: expected an int, got float"),
        ({"gate": "combined"}, "gate: expected a Gate such as"),
        ({"top_features": 2, "saes": {1: sae_for(model)}, "gate": Gate("no_sae")}, "no feature contributions"),
        (
            {"saes": {1: sae_for(model)}, "gate": Gate("shuffled", permutation=torch.zeros(40))},
            "expected a permutation",
        ),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            Explainer(model, **settings, preset="published")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="triton cannot run: Triton kernels run on CUDA devices only"):
        Explainer(model, backend="triton", preset="published")
    for settings, message in (
        ({"base": 0.0}, "base"), ({"base": float("inf")}, "base"), ({"slope": float("nan")}, "slope"),
        ({"mode": "all"}, "mode"), ({"permutation": torch.arange(3)}, "permutation"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Gate(**settings)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="permutation: expected an int64 tensor"):
        Gate("shuffled", permutation=[0, 1])  # type: ignore[arg-type]
    for wrong in ({"base": "3"}, {"base": True}, {"slope": None}, {"seed": 1.5}):
        with pytest.raises(TypeError, match=f"{next(iter(wrong))}: expected a number"):
            Gate(**wrong)  # type: ignore[arg-type]


def test_a_model_in_train_mode_with_dropout_is_refused(tiny_vit: Build) -> None:
    images = torch.randn(1, *PIXELS)
    model = tiny_vit(proj_drop_rate=0.1).train()
    with pytest.raises(ValueError, match=r"dropout is active in train mode .*call model.eval\(\) first"):
        Explainer(model, preset="published")(images)
    assert model.training
    without = tiny_vit().train()
    torch.testing.assert_close(
        Explainer(without, preset="published")(images).relevance,
        Explainer(without.eval(), preset="published")(images).relevance,
    )


def test_batch_norm_in_train_mode_is_refused_and_not_updated(tiny_vit: Build) -> None:
    model = nn.Sequential(tiny_vit(), nn.BatchNorm1d(5)).train()
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm1d\) is in train mode.*call model.eval\(\)"):
        Explainer(model, preset="published")(torch.randn(2, *PIXELS))
    assert int(model[1].num_batches_tracked) == 0  # type: ignore[arg-type]


def test_a_model_made_in_inference_mode_is_refused(tiny_vit: Build) -> None:
    with torch.inference_mode():
        model = tiny_vit()
    with pytest.raises(ValueError, match=r"made under torch\.inference_mode"):
        Explainer(model, preset="published")


@pytest.mark.parametrize("backend", ("native", "reference"))
def test_gradients_that_are_not_finite_are_said(backend: Any, tiny_vit: Build) -> None:
    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = tiny_vit()

        def forward(self, x: Tensor) -> Tensor:
            return (self.tower(x) * 0).abs().sqrt()  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match="the relevance came out NaN or Inf"):
        Explainer(Steep(), backend=backend, preset="published")(torch.randn(1, *PIXELS))


def test_a_model_on_several_devices_or_of_several_dtypes_is_refused(tiny_vit: Build) -> None:
    model = tiny_vit()
    model.head.double()  # type: ignore[operator,union-attr]
    with pytest.raises(ValueError, match=r"model: weight 'head.weight' of the tower is torch.float64, others are"):
        Explainer(model, preset="published")
    model = tiny_vit()
    model.head.to("meta")  # type: ignore[operator,union-attr]
    with pytest.raises(ValueError, match=r"model: weight 'head.weight' holds no values, it is on the meta device"):
        Explainer(model, preset="published")


def test_an_sae_changed_after_construction_is_caught(tiny_vit: Build) -> None:
    model = tiny_vit()
    explainer, images = Explainer(model, {1: sae_for(model)}, preset="published"), torch.randn(1, *PIXELS)
    explainer.saes[1].W_dec[3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"saes\[1\]: W_dec contains NaN or Inf"):
        explainer(images)
    explainer.saes[1] = sae_for(model).double()
    with pytest.raises(ValueError, match=r"saes\[1\]: is torch.float64 for a model of torch.float32"):
        explainer(images)


def test_numpy_numbers_are_taken(tiny_vit: Build) -> None:
    numpy = pytest.importorskip("numpy")
    model, images = tiny_vit(), torch.randn(2, *PIXELS)
    e = Explainer(model, {numpy.int64(1): sae_for(model)}, preset="published")(images, numpy.array([3, 0]))
    assert e.targets.tolist() == [3, 0] and list(e.gates) == [1]
    assert Explainer(model, preset="published")(images, numpy.int64(2)).targets.tolist() == [2, 2]


class FirstClass(nn.Module):
    """One number an image."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, x: Tensor) -> Tensor:
        return self.tower(x)[:, 0]  # type: ignore[no-any-return]


def test_output_that_is_no_logits_is_refused(tiny_vit: Build) -> None:
    with pytest.raises(ValueError, match=r"model: .*logits"):
        Explainer(tiny_vit(num_classes=0, global_pool=""), preset="published")(torch.randn(1, *PIXELS))
    with pytest.raises(ValueError, match=r"model: .*logits"):
        Explainer(FirstClass(tiny_vit()), backend="native", preset="published")(
            torch.randn(2, *PIXELS), [[0, 1], [1, 0]]
        )
