"""The C++ session against Python, through the module fga_runtime, on packages of a tiny model and on an Explainer's."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import packages
import PIL
import pytest
import torch
from PIL import Image
from runtime_package import (
    BATCH,
    HEIGHT,
    LAYER,
    MARKS,
    PREPROCESS,
    SHAPE,
    WIDTH,
    as_array,
    close,
    expected,
    random_picture,
)

from fga_fast import Explanation, load_package
from fga_fast.io.images import Preprocess

pytest_plugins = ("runtime_fixtures",)
pytestmark = MARKS


def agrees(found: Any, python: Explanation) -> None:
    assert python.values is not None
    assert python.blocks is not None
    assert (found.grid, found.image_size) == (python.grid, python.image_size)
    assert found.targets.dtype == np.int64
    assert found.relevance.dtype == found.logits.dtype == python.relevance.numpy().dtype
    assert found.targets.tolist() == python.targets.tolist()
    close(found.logits, python.logits)
    close(found.values, python.values)
    close(found.relevance, python.relevance)
    close(found.scores[LAYER], python.scores[LAYER])
    close(found.gates[LAYER], python.gates[LAYER])
    close(found.more["blocks"], python.blocks)
    close(found.heatmap(), python.heatmap())
    close(found.heatmap((37, 20)), python.heatmap((37, 20)))


@pytest.mark.parametrize("count", [1, BATCH - 1, BATCH, BATCH + 1, 3 * BATCH + 2])
def test_any_number_of_images(session: Any, count: int) -> None:
    images = torch.randn(count, *SHAPE)
    found = session.explain(images.numpy())
    agrees(found, expected(images))
    assert (found.relevance > 0).any()


def test_no_images(session: Any) -> None:
    found = session.explain(np.zeros((0, *SHAPE), np.float32))
    assert found.logits.shape == (0, 5)
    assert found.relevance.shape == found.gates[LAYER].shape == (0, 6)
    assert found.heatmap().shape == (0, HEIGHT, WIDTH)


def test_layouts_of_arrays(session: Any) -> None:
    images = torch.randn(4, *SHAPE)
    python = expected(images)
    agrees(session.explain(images.numpy().astype(np.float64)), python)
    agrees(session.explain(images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).numpy()), python)
    agrees(session.explain(np.repeat(images.numpy(), 2, axis=0)[::2]), python)


def test_what_explainer_exports(module: Any, tmp_path: Path) -> None:
    """A transformer, two SAEs, their strongest features and every block, from pictures, beside Python's package."""
    explainer = packages.explainer(torch.float32, top_features=4, per_block=True)
    example = packages.images(2, torch.float32)
    path = explainer.export(tmp_path / "x.pt2", example, preprocessing=packages.PREPROCESS, class_names=packages.NAMES)
    session = module.Session(path)
    assert (session.batch, session.layers) == (2, sorted(explainer.saes))
    assert session.class_names == list(packages.NAMES)
    generator = np.random.default_rng(4)
    pictures = [random_picture(generator) for _ in range(3)]
    images = torch.stack([packages.PREPROCESS(picture) for picture in pictures])
    python, found = load_package(path)(images), session.explain([as_array(picture) for picture in pictures])
    assert python.values is not None
    assert python.blocks is not None
    assert found.targets.tolist() == python.targets.tolist()
    close(found.logits, python.logits)
    close(found.values, python.values)
    close(found.more["blocks"], python.blocks)
    close(found.relevance, python.relevance)
    close(found.heatmap(), python.heatmap())
    for layer, top in python.features.items():
        close(found.scores[layer], python.scores[layer])
        close(found.gates[layer], python.gates[layer])
        for name, tensor in top._asdict().items():
            close(found.more[f"features.{layer}.{name}"], tensor)


def test_what_a_session_says_of_itself(session: Any) -> None:
    assert (session.batch, session.layers, session.takes_targets) == (BATCH, [LAYER], False)
    assert session.class_names[4] == "émeu"


def test_targets(module: Any, package_of_given: Path) -> None:
    session = module.Session(package_of_given)
    images = torch.randn(BATCH + 1, *SHAPE, dtype=torch.float64)
    agrees(session.explain(images.numpy(), [4, 0, 3, 1]), expected(images, torch.tensor([4, 0, 3, 1])))
    agrees(session.explain(images.numpy(), 2), expected(images, torch.full((BATCH + 1,), 2)))
    agrees(session.explain(images.numpy(), np.array([1, 2, 3, 4])), expected(images, torch.tensor([1, 2, 3, 4])))
    for targets, message in (
        (None, "explains given classes; pass one for each image"),
        ([1, 2], r"expected one class an image, shape \[4\], got \[2\]"),
        ([0, 1, 2, 5], "expected classes 0 to 4, got 5"),
        (-1, "expected classes 0 to 4, got -1"),
    ):
        with pytest.raises(module.Error, match=f"targets: .*{message}"):
            session.explain(images.numpy(), targets)


def test_pixels_are_those_of_pillow(module: Any) -> None:
    """Every setting; sizes around the usual corners: no resize, one direction only, halves, a single pixel."""
    generator = np.random.default_rng(0)
    # Pillow 13 goes vertically first where that is faster; before, a rounding could fall to the other side.
    tolerance = 0 if int(PIL.__version__.split(".")[0]) >= 13 else 1
    for _ in range(400):
        picture = random_picture(generator)
        channels = int(generator.choice([1, 3]))
        settings = {
            "image_size": tuple(int(side) for side in generator.choice([1, 5, 32, 48, 64], 2)),
            "mean": (0.485, 0.456, 0.406)[:channels],
            "std": (0.229, 0.224, 0.225)[:channels],
            "crop_pct": float(generator.choice([1, 0.95, 0.9, 0.875, 0.5])),
            "interpolation": str(generator.choice(["bicubic", "bilinear", "nearest"])),
            "squash": bool(generator.random() < 0.3),
        }
        python, native = Preprocess(**settings), module.Preprocess(**settings)
        seen = np.asarray(python.view(picture)).reshape(*settings["image_size"], channels)
        view = native.view(as_array(picture))
        assert np.abs(seen.astype(int) - view).max() <= tolerance, (picture.size, settings)
        if (seen == view).all():
            assert (native(as_array(picture)) == python(picture).numpy()).all(), (picture.size, settings)


def test_pictures_of_several_sizes(session: Any) -> None:
    generator = np.random.default_rng(1)
    pictures = [random_picture(generator) for _ in range(2 * BATCH + 1)]
    images = torch.stack([PREPROCESS(picture) for picture in pictures])
    agrees(session.explain([as_array(picture) for picture in pictures]), expected(images))


def test_pictures_of_one_size(session: Any) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (2, 50, 70, 3), dtype=np.uint8)
    images = torch.stack([PREPROCESS(Image.fromarray(one)) for one in pixels])
    agrees(session.explain(pixels), expected(images))
    agrees(session.explain(pixels[0]), expected(images[:1]))
    mirrored = pixels[:, ::-1, ::-1]
    agrees(session.explain(mirrored), expected(torch.stack([PREPROCESS(Image.fromarray(one)) for one in mirrored])))


def test_threads_get_their_own_images(module: Any, package: Path) -> None:
    for runners in (1, 3):
        session = module.Session(package, runners=runners)
        batches = [torch.randn(1 + i % 5, *SHAPE) for i in range(24)]
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda images, session=session: session.explain(images.numpy()), batches))
        for images, one in zip(batches, found, strict=True):
            agrees(one, expected(images))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 3, 32, 32), np.float32), r"images: expected shape \[B, 3, 32, 48\], got \[1, 3, 32, 32\]"),
        (np.zeros(SHAPE, np.float32), r"images: expected .*got \[3, 32, 48\]; add a batch dimension with images\["),
        (np.full((1, *SHAPE), np.nan, np.float32), "images: contain NaN or Inf; check the preprocessing"),
        (np.full((1, *SHAPE), np.inf, np.float64), "images: contain NaN or Inf; check the preprocessing"),
        (np.full((1, *SHAPE), 3e38, np.float32), "the logits came out NaN or Inf although images are finite: an overf"),
        (np.zeros((8, 8, 4), np.uint8), r"images: expected pictures \[H, W, 3\] or \[H, W, 1\] .*got \[8, 8, 4\]"),
        (np.zeros((8, 0, 3), np.uint8), r"images: expected pictures .*got \[8, 0, 3\]"),
        (np.zeros((8, 8), np.uint8), "images: expected uint8 .*, got 2 dimensions"),
        ([np.zeros((8, 8, 3), np.float32)], r"images: expected pictures .* of uint8"),
    ],
)  # fmt: skip
def test_images_are_checked(module: Any, session: Any, images: Any, message: str) -> None:
    with pytest.raises(module.Error, match=message):
        session.explain(images)


def test_nan_beyond_the_first_batch_is_found(module: Any, session: Any) -> None:
    images = np.zeros((BATCH + 2, *SHAPE), np.float32)
    images[-1, 0, 3, 4] = np.nan
    with pytest.raises(module.Error, match="images: contain NaN or Inf"):
        session.explain(images)


def test_other_arguments_are_checked(module: Any, session: Any, package: Path) -> None:
    image = np.zeros((1, *SHAPE), np.float32)
    with pytest.raises(module.Error, match=r"targets: this package explains the predicted class"):
        session.explain(image, [1])
    with pytest.raises(module.Error, match=r"size: expected at least 1 pixel a side"):
        session.explain(image).heatmap((0, 5))
    with pytest.raises(module.Error, match="runners: expected at least 1, got 0"):
        module.Session(package, runners=0)
    with pytest.raises(TypeError, match=r"expected uint8 .* or float .*, got int64"):
        session.explain(np.zeros((1, *SHAPE), np.int64))
    assert issubclass(module.Error, ValueError)


def test_packages_are_checked(module: Any, altered: Callable[..., Path], tmp_path: Path) -> None:
    for changes, message in (
        ({"sha256": "0" * 64}, r"is not the file that its metadata was written for \(sha256\)"),
        ({"format_version": 2}, "format_version: expected 1, got 2; use a newer runtime"),
        ({"grid": [3, 3]}, r"outputs: expected relevance of shape \[3, 9\]|expected gates"),
        ({"backend": "triton"}, 'calls Triton kernels, which need Python; export it with backend="composite"'),
        ({"device": "cuda"}, "calls Triton kernels"),
        ({"machine": {"architecture": "z80", "features": []}}, "for another processor, this one lacks z80; export it"),
    ):
        with pytest.raises(module.Error, match=message):
            module.Session(altered(**changes))
    module.Session(altered(sha256="0" * 64), verify=False)
    with pytest.raises(module.Error, match="images: the package has no preprocessing"):
        module.Session(altered(preprocessing=None)).explain(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(
        module.Error, match=r"package: expected blocks of shape \[3, 2, 6\] and dtype float32, got \[3, 5\]"
    ):
        path = altered(outputs=list(reversed(json.loads(altered().with_suffix(".json").read_text())["outputs"])))
        module.Session(path).explain(np.zeros((1, *SHAPE), np.float32))
    with pytest.raises(module.Error, match="package: no file"):
        module.Session(tmp_path / "nothing.pt2")
    broken = tmp_path / "broken.pt2"
    broken.write_bytes(b"PK, but no more")
    about = json.loads(altered().with_suffix(".json").read_text())
    broken.with_suffix(".json").write_text(json.dumps({**about, "sha256": None}))
    with pytest.raises(module.Error, match=r"does not load in torch .* \(made by 2\."):
        module.Session(broken)
