"""The C++ session: built by CMake, installed, linked by a program, and against Python, on a package of a tiny model.

FGA_FAST_CMAKE_BUILD names a build folder to use instead of a new one; it must be of this source tree, with
-DFGA_FAST_PYBIND=ON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import runtime_package
import torch
from PIL import Image
from runtime_package import BATCH, GRID, HEIGHT, LAYER, PREPROCESS, SHAPE, WIDTH, as_array, expected, random_picture
from torch import Tensor

from fga_fast import Explanation
from fga_fast.images import Preprocess

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.slow,
    # Without a compiler or CMake there is nothing to test, but CI has both.
    pytest.mark.skipif(shutil.which("cmake") is None and not os.environ.get("CI"), reason="no cmake"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of torch.export about itself
]


def run(*command: str | Path, **settings: Any) -> str:
    """What a command prints; its error output is the failure's message."""
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, **settings)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout[-3000:]}{result.stderr[-3000:]}"
    return result.stdout


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built project."""
    if given := os.environ.get("FGA_FAST_CMAKE_BUILD"):
        return Path(given)
    folder = tmp_path_factory.mktemp("cmake")
    torch_root = Path(torch.__file__).parent
    options = [f"-DFGA_FAST_TORCH={torch_root}", "-DFGA_FAST_PYBIND=ON", f"-DPython3_EXECUTABLE={sys.executable}"]
    run("cmake", "-S", ROOT, "-B", folder, *options)
    run("cmake", "--build", folder, "--parallel", os.environ.get("MAX_JOBS", "2"))
    return folder


@pytest.fixture(scope="session")
def installed(build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", build, "--prefix", prefix)
    return prefix


@pytest.fixture(scope="session")
def consumer(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program of a project of its own, which finds the installed one."""
    folder = tmp_path_factory.mktemp("consumer")
    run("cmake", "-S", ROOT / "tests" / "runtime" / "consumer", "-B", folder, f"-DCMAKE_PREFIX_PATH={installed}")
    run("cmake", "--build", folder)
    return folder / "consumer"


@pytest.fixture(scope="session")
def module(build: Path) -> Any:
    """The Python module fga_runtime."""
    (path,) = (build / "python").glob("fga_runtime*.so")
    spec = importlib.util.spec_from_file_location("fga_runtime", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the predicted class."""
    return runtime_package.export(tmp_path_factory.mktemp("package") / "tiny.pt2")


@pytest.fixture(scope="session")
def package_of_given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of classes that the caller gives, in float64."""
    return runtime_package.export(tmp_path_factory.mktemp("package") / "given.pt2", True, torch.float64)


@pytest.fixture(scope="session")
def session(module: Any, package: Path) -> Any:
    return module.Session(package)


@pytest.fixture
def altered(package: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the package with other metadata."""

    def alter(**changes: Any) -> Path:
        copy = Path(shutil.copy(package, tmp_path / "altered.pt2"))
        about = json.loads(package.with_suffix(".json").read_text(encoding="utf-8"))
        copy.with_suffix(".json").write_text(json.dumps({**about, **changes}), encoding="utf-8")
        return copy

    return alter


def close(found: Any, tensor: Tensor) -> None:
    np.testing.assert_allclose(found, tensor.numpy(), rtol=1e-5, atol=1e-5)


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
    with pytest.raises(module.Error, match="images: the package says nothing of preprocessing"):
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


def test_python_without_fga_fast_and_without_torch(build: Path, package: Path) -> None:
    """The module finds the operators by itself, and torch may be imported after it."""
    code = f"""
import sys; sys.path.insert(0, {str(build / "python")!r})
import fga_runtime, numpy as np
session = fga_runtime.Session({str(package)!r})
assert not {{"torch", "fga_fast"}} & set(sys.modules)
print(session.explain(np.ones((2, 3, 32, 48), np.float32)).values.tolist())
import torch
assert hasattr(torch.ops.fga_fast, "score")
print(session.explain(torch.ones(2, 3, 32, 48).numpy()).values.tolist())
"""
    environment = {name: value for name, value in os.environ.items() if name != "FGA_FAST_LIBRARY"}
    first, second = run(sys.executable, "-c", code, env=environment, cwd="/").splitlines()
    values = expected(torch.ones(2, *SHAPE)).values
    assert values is not None
    assert first == second
    close(json.loads(first), values)


def test_an_installed_program_in_threads(consumer: Path, package: Path, tmp_path: Path) -> None:
    """Two sessions of one process, three threads each, five images in batches of three."""
    images = torch.randn(5, *SHAPE)
    images.numpy().tofile(tmp_path / "images")
    run(consumer, "3", tmp_path / "images", *map(str, images.shape), tmp_path / "out", package, package)
    python = expected(images)
    assert python.values is not None
    parts = [python.logits, python.targets, python.values, python.relevance]
    parts += [python.scores[LAYER], python.gates[LAYER], python.heatmap()]
    close(np.fromfile(tmp_path / "out"), torch.cat([part.double().flatten() for part in parts]))


def test_an_installed_program_that_fails(consumer: Path, package: Path, tmp_path: Path) -> None:
    np.zeros(10, np.float32).tofile(tmp_path / "images")
    command = [consumer, "1", tmp_path / "images", "1", "3", "8", "8", tmp_path / "out", package]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("consumer: images: expected shape [B, 3, 32, 48], got [1, 3, 8, 8]")


@pytest.mark.parametrize("suffix", ["ppm", "png"])
def test_the_example(build: Path, session: Any, package: Path, tmp_path: Path, suffix: str) -> None:
    program = build / "examples" / "cpp" / "explain"
    if suffix == "png" and "libpng" not in run("ldd", program):
        pytest.skip("built without libpng")
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (40, 90, 3), dtype=np.uint8))
    picture.save(tmp_path / f"picture.{suffix}")
    printed = run(program, package, tmp_path / f"picture.{suffix}", tmp_path / "out.png")
    found = session.explain(np.asarray(picture))
    target = int(found.targets[0])
    assert printed.startswith(f"class {target} ({session.class_names[target]}), logit {found.values[0]:.4f}\n")
    row, column = divmod(int(found.relevance.argmax()), GRID[1])
    assert f"row {row}, column {column} of {GRID[0]} x {GRID[1]}" in printed
    with Image.open(tmp_path / "out.png") as overlay:
        overlay.load()
        assert (overlay.size, overlay.mode) == ((WIDTH, HEIGHT), "RGB")
        painted = np.asarray(overlay).astype(int)
    heat, view = found.heatmap()[0], np.asarray(PREPROCESS.view(picture)).astype(int)
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    assert np.abs(painted[y, x] - (view[y, x] + np.array([255, 63, 0])) // 2).max() <= 1  # red where most relevant


def test_the_example_says_what_is_wrong(build: Path, package: Path, tmp_path: Path) -> None:
    (tmp_path / "short.ppm").write_bytes(b"P6 # wide\n4 4 255\nabc")
    command = [build / "examples" / "cpp" / "explain", package, tmp_path / "short.ppm", tmp_path / "out.png"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.strip().endswith("short.ppm: the PPM file is truncated")


def test_no_python_in_it(build: Path, installed: Path, consumer: Path) -> None:
    libraries = [path for path in installed.rglob("*.so") if path.parent.name != "python"]
    assert {path.name for path in libraries} >= {"libfga_ops.so", "libfga_runtime.so"}
    for path in (*libraries, consumer, build / "examples" / "cpp" / "explain"):
        needed = run("ldd", path)
        assert "python" not in needed.replace(str(Path(torch.__file__).parent), ""), path
        assert "not found" not in needed, path
    undefined = run("nm", "-D", "--undefined-only", *libraries)
    assert " Py" not in undefined
    assert " _Py" not in undefined


def test_the_library_exports_its_interface_only(installed: Path) -> None:
    library = next(installed.rglob("libfga_runtime.so"))
    symbols = run("nm", "-DC", "--defined-only", library).splitlines()
    own = [symbol.split(" ", 2)[2] for symbol in symbols if "fga::" in symbol and " V " not in symbol]
    assert any("fga::Result::heatmap" in symbol for symbol in own)
    assert not [
        symbol for symbol in own if "parse_json" in symbol or "sha256_of_file" in symbol or "load_ops" in symbol
    ]
