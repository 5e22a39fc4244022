"""The C++ session against Python on packages of a small model, through the module fga_runtime."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from explaining import held
from own_vit import CLASSES, GRID
from packages import NAMES, PREPROCESS, images
from PIL import Image
from session_case import BATCH, MARKS, SHAPE, as_array, close, random_picture

from fga_fast import Explanation, Package, load_package
from fga_fast.io.images import Preprocess

pytestmark = MARKS


def agrees(found: Any, python: Explanation) -> None:
    assert (found.grid, found.image_size) == (python.grid, python.image_size)
    assert found.targets.dtype == np.int64 and found.targets.tolist() == python.targets.tolist()
    assert found.relevance.dtype == found.logits.dtype == python.relevance.numpy().dtype
    close(found.logits, python.logits)
    for name, tensor in held(python).items():
        what, _, layer = name.partition(".")
        if what in ("scores", "gates"):
            close(getattr(found, what)[int(layer)], tensor)
        else:
            close(found.more[name] if what in ("blocks", "features", "ungated") else getattr(found, name), tensor)
    close(found.heatmap(), python.heatmap())
    close(found.heatmap((37, 20)), python.heatmap((37, 20)))


@pytest.mark.parametrize("count", [1, BATCH, BATCH + 1, 3 * BATCH + 1])
def test_any_number_of_images(session: Any, python: Package, count: int) -> None:
    found = session.explain(images(count).numpy())
    agrees(found, python(images(count)))
    assert (found.relevance > 0).any()


def test_no_images(session: Any) -> None:
    found = session.explain(np.zeros((0, *SHAPE), np.float32))
    assert found.logits.shape == (0, CLASSES)
    assert found.relevance.shape == found.gates[0].shape == (0, GRID[0] * GRID[1])
    assert found.heatmap().shape == (0, *SHAPE[1:])


def test_layouts_of_arrays(session: Any, python: Package) -> None:
    four = images(4, torch.float32)
    expected = python(four.double())
    agrees(session.explain(four.numpy()), expected)
    agrees(session.explain(four.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).numpy()), expected)
    agrees(session.explain(np.repeat(four.numpy(), 2, axis=0)[::2]), expected)


def test_what_a_session_says_of_itself(session: Any) -> None:
    assert (session.batch, session.gated_blocks, session.takes_targets) == (BATCH, [0, 1], False)
    assert session.class_names == NAMES


def test_targets(module: Any, given_package: Path, tmp_path: Path) -> None:
    """In float32, with the strongest features and every block; from images and from pictures."""
    session, python = module.Session(given_package), load_package(given_package)
    four = images(4, torch.float32)
    for targets in ([4, 0, 3, 1], 2, np.array([1, 2, 3, 4]), None):
        agrees(session.explain(four.numpy(), targets), python(four, targets))
    agrees(session.explain(four.numpy(), [-1, 2, -1, 0]), python(four, [None, 2, None, 0]))
    agrees(session.explain(four.double().numpy(), 2), python(four, 2))
    generator = np.random.default_rng(4)
    pictures = [random_picture(generator) for _ in range(4)]
    agrees(session.explain([as_array(picture) for picture in pictures], 1), python(seen(pictures).float(), 1))
    for targets, message in (
        ([1, 2], r"expected one class an image, shape \[4\], got \[2\]"),
        ([0, 1, 2, 5], "expected classes 0 to 4, or -1 for the predicted one, got 5"),
        (-2, "expected classes 0 to 4, or -1 for the predicted one, got -2"),
    ):
        with pytest.raises(module.Error, match=f"targets: .*{message}"):
            session.explain(four.numpy(), targets)
    about = json.loads(given_package.with_suffix(".json").read_text(encoding="utf-8"))
    headless = Path(shutil.copy(given_package, tmp_path / "headless.pt2"))
    headless.with_suffix(".json").write_text(json.dumps({**about, "predicts": False}))
    other = module.Session(headless)
    agrees(other.explain(four.numpy(), 3), python(four, 3))
    for targets in (None, [0, 1, -1, 2]):
        with pytest.raises(module.Error, match="targets: the package is of a model without a classification head"):
            other.explain(four.numpy(), targets)


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


def seen(pictures: list[Image.Image]) -> torch.Tensor:
    return torch.stack([PREPROCESS(picture) for picture in pictures]).double()


def test_pictures_of_several_sizes(session: Any, python: Package) -> None:
    generator = np.random.default_rng(1)
    pictures = [random_picture(generator) for _ in range(2 * BATCH + 1)]
    agrees(session.explain([as_array(picture) for picture in pictures]), python(seen(pictures)))


def test_pictures_of_one_size(session: Any, python: Package) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (2, 50, 70, 3), dtype=np.uint8)
    expected = python(seen([Image.fromarray(one) for one in pixels]))
    agrees(session.explain(pixels), expected)
    agrees(session.explain(pixels[0]), expected[:1])
    mirrored = pixels[:, ::-1, ::-1]
    agrees(session.explain(mirrored), python(seen([Image.fromarray(one) for one in mirrored])))


def test_threads_get_their_own_images(module: Any, python: Package, predicted_package: Path) -> None:
    batches = [torch.randn(1 + i % 5, *SHAPE, dtype=torch.float64) for i in range(24)]
    expected = [python(batch) for batch in batches]
    for runners in (1, 3):
        session = module.Session(predicted_package, runners=runners)
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda batch, session=session: session.explain(batch.numpy()), batches))
        for one, other in zip(found, expected, strict=True):
            agrees(one, other)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((1, 3, 32, 32), np.float32), r"images: expected shape \[B, 3, 16, 24\], got \[1, 3, 32, 32\]"),
        (np.zeros(SHAPE, np.float32), r"images: expected .*got \[3, 16, 24\]; add a batch dimension with images\["),
        (np.full((1, *SHAPE), np.nan, np.float32), "images: contain NaN or Inf; check the preprocessing"),
        (np.full((1, *SHAPE), np.inf, np.float64), "images: contain NaN or Inf; check the preprocessing"),
        (np.full((1, *SHAPE), 1.7e308), "the logits came out NaN or Inf although images are finite: an overf"),
        (np.zeros((8, 8, 4), np.uint8), r"images: expected pictures \[H, W, 3\] or \[H, W, 1\] .*got \[8, 8, 4\]"),
        (np.zeros((8, 0, 3), np.uint8), r"images: expected pictures .*got \[8, 0, 3\]"),
        (np.zeros((8, 8), np.uint8), "images: expected uint8 .*, got 2 dimensions"),
        ([np.zeros((8, 8, 3), np.float32)], r"images: expected pictures .* of uint8"),
    ],
)  # fmt: skip
def test_images_are_checked(module: Any, session: Any, given: Any, message: str) -> None:
    with pytest.raises(module.Error, match=message):
        session.explain(given)


def test_nan_beyond_the_first_batch_is_found(module: Any, session: Any) -> None:
    many = np.zeros((BATCH + 2, *SHAPE), np.float32)
    many[-1, 0, 3, 4] = np.nan
    with pytest.raises(module.Error, match="images: contain NaN or Inf"):
        session.explain(many)


def test_other_arguments_are_checked(module: Any, session: Any, predicted_package: Path) -> None:
    image = np.zeros((1, *SHAPE), np.float32)
    with pytest.raises(module.Error, match=r"targets: this package explains the predicted class"):
        session.explain(image, [1])
    with pytest.raises(module.Error, match=r"size: expected at least 1 pixel a side"):
        session.explain(image).heatmap((0, 5))
    with pytest.raises(module.Error, match="runners: expected at least 1, got 0"):
        module.Session(predicted_package, runners=0)
    with pytest.raises(TypeError, match=r"expected uint8 .* or float .*, got int64"):
        session.explain(np.zeros((1, *SHAPE), np.int64))
    assert issubclass(module.Error, ValueError)


def test_packages_are_checked(module: Any, altered: Callable[..., Path], tmp_path: Path) -> None:
    for changes, message in (
        ({"sha256": "0" * 64}, r"is not the file that its metadata was written for \(sha256\)"),
        ({"format_version": 2}, "format_version: expected 5, got 2; export it again, or use the runtime"),
        ({"grid": [3, 3]}, r"outputs: expected relevance of shape \[2, 9\], got \[2, 6\]"),
        ({"backend": "triton"}, 'calls Triton kernels, which need Python; export it with backend="composite"'),
        ({"device": "cuda"}, "calls Triton kernels"),
        ({"machine": {"architecture": "z80", "features": []}}, "for another processor, this one lacks z80; export it"),
    ):
        with pytest.raises(module.Error, match=message):
            module.Session(altered(**changes))
    module.Session(altered(sha256="0" * 64), verify=False)
    with pytest.raises(module.Error, match="images: the package has no preprocessing"):
        module.Session(altered(preprocessing=None)).explain(np.zeros((8, 8, 3), np.uint8))
    outputs = json.loads(altered().with_suffix(".json").read_text())["outputs"]
    path = altered(outputs=outputs[::-1])
    with pytest.raises(module.Error, match=r"expected ungated of shape \[2, 6\] and dtype float64, got \[2, 5\]"):
        module.Session(path).explain(np.zeros((1, *SHAPE), np.float32))
    with pytest.raises(module.Error, match="package: no file"):
        module.Session(tmp_path / "nothing.pt2")
    broken = tmp_path / "broken.pt2"
    broken.write_bytes(b"PK, but no more")
    about = json.loads(altered().with_suffix(".json").read_text())
    broken.with_suffix(".json").write_text(json.dumps({**about, "sha256": None}))
    with pytest.raises(module.Error, match=r"does not load in torch .* \(made by 2\."):
        module.Session(broken)
