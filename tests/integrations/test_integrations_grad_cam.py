"""FGA with pytorch-grad-cam's interface, with the real library's targets, overlay and metrics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from adapters import assert_shared, images
from explaining import Build, sae_for
from torch import Tensor, nn

from fga_fast.integrations.grad_cam import FGACam

pytest.importorskip("pytorch_grad_cam")
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.metrics.cam_mult_image import CamMultImageConfidenceChange
from pytorch_grad_cam.metrics.road import ROADMostRelevantFirst
from pytorch_grad_cam.utils.image import show_cam_on_image
from pytorch_grad_cam.utils.model_targets import (
    ClassifierOutputReST,
    ClassifierOutputSoftmaxTarget,
    ClassifierOutputTarget,
    FinerWeightedTarget,
    RawScoresOutputTarget,
)


@pytest.fixture
def model(tiny_vit: Build) -> nn.Module:
    return tiny_vit()


@pytest.fixture
def cam(model: nn.Module) -> FGACam:
    return FGACam(model, saes={1: sae_for(model, activation="relu")})


def heat(cam: FGACam, targets: Any, inputs: Tensor | None = None) -> np.ndarray:
    """What `Explainer` gives by itself."""
    return cam.explainer(images() if inputs is None else inputs, targets).heatmap().numpy()


def test_it_is_the_explainers_heat_map(model: nn.Module, cam: FGACam) -> None:
    maps = cam(input_tensor=images(), targets=[ClassifierOutputTarget(4), ClassifierOutputTarget(1)])
    assert isinstance(maps, np.ndarray)
    assert maps.dtype == np.float32
    assert maps.shape == (2, 32, 48)
    assert maps.min() == 0
    assert maps.max() == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(maps, heat(cam, torch.tensor([4, 1])), atol=1e-5)
    assert np.abs(maps - heat(cam, torch.tensor([1, 4]))).max() > 0.1


def test_without_targets_the_predicted_classes_are_explained(model: nn.Module, cam: FGACam) -> None:
    np.testing.assert_array_equal(cam(images()), heat(cam, model(images()).argmax(1)))
    np.testing.assert_array_equal(cam(images(), targets=None), cam(images()))


@pytest.mark.parametrize(
    "target",
    [
        ClassifierOutputSoftmaxTarget(2),
        ClassifierOutputReST(2),
        FinerWeightedTarget(2, [0, 1], alpha=0.5),
        lambda output: output[2] - output[0],
    ],
    ids=lambda target: type(target).__name__,
)
def test_any_target_of_one_images_output(cam: FGACam, target: Any) -> None:
    """Both images together give what each gives alone, and the gradient is that of the target."""
    maps = cam(images(), targets=[target, target])
    alone = heat(cam, lambda logits: target(logits[0]).reshape(1), images()[1:])
    np.testing.assert_allclose(maps[1:], alone, atol=1e-4)
    assert np.abs(maps - cam(images(), targets=[ClassifierOutputTarget(3)] * 2)).max() > 0.01


def test_raw_scores_of_a_model_with_one_output(tiny_vit: Build) -> None:
    cam = FGACam(tiny_vit(num_classes=1))
    maps = cam(images(), targets=[RawScoresOutputTarget()] * 2)
    np.testing.assert_allclose(maps, heat(cam, 0), atol=1e-5)


def test_it_takes_the_place_of_theirs(model: nn.Module) -> None:
    """The same lines with GradCAM and with FGACam, overlay and ROAD included."""

    def as_picture(tokens: Tensor) -> Tensor:  # [B, 7, C] -> [B, C, 2, 3]
        return tokens[:, 1:].reshape(len(tokens), 2, 3, -1).movedim(-1, 1)

    targets = [ClassifierOutputTarget(4), ClassifierOutputTarget(1)]
    cams = GradCAM(model, [model.blocks[-1].norm1], as_picture), FGACam(model)  # type: ignore[index, union-attr]
    found = []
    for method in cams:
        with method as cam:
            maps = cam(input_tensor=images(), targets=targets)
        picture = images()[0].movedim(0, -1).sigmoid().numpy()
        overlay = show_cam_on_image(picture, maps[0], use_rgb=True)
        road = ROADMostRelevantFirst(percentile=60)(images(), maps, targets, model)
        drop = CamMultImageConfidenceChange()(images(), maps, targets, model)
        found.append((maps, overlay, road, drop))
    for theirs, ours in zip(*found, strict=True):
        assert (theirs.shape, theirs.dtype) == (ours.shape, ours.dtype)
        assert np.isfinite(ours).all()


def test_smoothing_is_the_librarys(cam: FGACam) -> None:
    transforms = pytest.importorskip("ttach")
    targets = [ClassifierOutputTarget(4), ClassifierOutputTarget(1)]

    class Theirs:
        tta_transforms = transforms.Compose([transforms.HorizontalFlip(), transforms.Multiply(factors=[0.9, 1, 1.1])])

        def forward(self, inputs: Tensor, targets: Any, eigen_smooth: bool) -> np.ndarray:
            return cam(inputs.contiguous(), targets)

    expected = GradCAM.forward_augmentation_smoothing(Theirs(), images(), targets)  # type: ignore[arg-type]
    smooth = cam(images(), targets, aug_smooth=True)
    np.testing.assert_allclose(smooth, expected, atol=1e-6)
    assert np.abs(smooth - cam(images(), targets)).max() > 0.01


def test_negative_relevance_is_cut_off(model: nn.Module) -> None:
    cam = FGACam(model, signed=True)
    relevance = cam.explainer(images(), 2).relevance
    assert bool((relevance < 0).any())
    maps = cam(images(), 2)
    corners = maps[:, [0, 0, 0, -1, -1, -1], [0, 24, -1, 0, 24, -1]]  # a pixel where only one patch counts
    assert (corners[:, [0, 2, 3, 5]][relevance[:, [0, 2, 3, 5]].numpy() <= 0] == 0).all()


def test_numpy_images_of_any_layout(cam: FGACam) -> None:
    expected = cam(images(), targets=2)
    pixels = images().numpy()
    for array in (
        pixels,
        pixels.astype(np.float64),
        pixels.transpose(0, 2, 3, 1),
        np.ascontiguousarray(pixels[..., ::-1])[..., ::-1],
        pixels.astype(">f4"),
    ):
        before = array.copy()
        np.testing.assert_allclose(cam(array, targets=2), expected, rtol=0, atol=1e-4)
        np.testing.assert_array_equal(array, before)


def test_the_model_is_left_as_it_came_and_threads_share_it(model: nn.Module, cam: FGACam) -> None:
    assert_shared(model, lambda batch: cam(batch, targets=2))


def test_an_exception_passes_the_context(model: nn.Module) -> None:
    """The library's own context swallows an IndexError."""
    with pytest.raises(ValueError, match="raised IndexError"), FGACam(model) as cam:
        cam(images(), targets=[ClassifierOutputTarget(5)] * 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"targets": [ClassifierOutputTarget(1)]},
            "targets: expected one callable an image, 2, got 1; .* its number alone",
        ),
        ({"targets": [RawScoresOutputTarget()] * 2}, r"targets: RawScoresOutputTarget gave a tensor \[5\]"),
        ({"targets": [lambda output: 1.0] * 2}, "targets: function gave float"),
        ({"targets": torch.tensor([[0, 1], [1, 2]])}, "targets: expected one an image"),
        ({"targets": 5}, "targets: "),
        ({"targets": 2, "eigen_smooth": True}, "eigen_smooth: expected False"),
        ({"input_tensor": [[1.0]]}, "inputs: expected a tensor or a NumPy array"),
        ({"input_tensor": np.zeros((1, 3, 32, 48), dtype=np.uint8)}, "inputs: expected floats"),
    ],
)
def test_errors_name_the_argument(cam: FGACam, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        cam(**{"input_tensor": images(), **arguments})


def test_their_layers_are_not_wanted(model: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"target_layers and reshape_transform: FGACam reads blocks.* give neither"):
        FGACam(model, target_layers=[model], reshape_transform=None)
