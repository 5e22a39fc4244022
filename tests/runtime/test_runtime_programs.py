"""Programs of the C++ session: installed and linked by another project, the example, Python without fga_fast."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_vit import GRID
from packages import PREPROCESS, images
from PIL import Image
from session_case import BATCH, MARKS, ROOT, SHAPE, close, run, written

from fga_fast import Package

pytestmark = MARKS


def test_python_without_fga_fast_and_without_torch(build: Path, python: Package) -> None:
    """The module finds the operators by itself, and torch may be imported after it."""
    code = f"""
import sys; sys.path.insert(0, {str(build / "python")!r})
import fga_runtime, numpy as np
session = fga_runtime.Session({str(python.path)!r})
assert not {{"torch", "fga_fast"}} & set(sys.modules)
print(session.explain(np.ones((2, *{SHAPE}), np.float32)).values.tolist())
import torch
assert hasattr(torch.ops.fga_fast, "score")
print(session.explain(torch.ones(2, *{SHAPE}).numpy()).values.tolist())
"""
    environment = {name: value for name, value in os.environ.items() if name != "FGA_FAST_LIBRARY"}
    first, second = run(sys.executable, "-c", code, env=environment, cwd="/").splitlines()
    values = python(torch.ones(2, *SHAPE, dtype=torch.float64)).values
    assert values is not None and first == second
    close(json.loads(first), values)


def test_python_beside_fga_fast(build: Path, predicted_package: Path) -> None:
    """Whoever loads the operators first, they are registered once."""
    code = f"""
import sys; sys.path.insert(0, {str(build / "python")!r})
import fga_fast, fga_runtime
fga_runtime.Session({str(predicted_package)!r})
print(fga_fast.load_package({str(predicted_package)!r}).metadata.batch)
"""
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == str(BATCH)


def test_an_installed_program_in_threads(consumer: Path, python: Package, tmp_path: Path) -> None:
    """Two sessions of one process, three threads each, five images in batches of two."""
    five = images(5, torch.float32)
    five.numpy().tofile(tmp_path / "images")
    run(consumer, "host", "3", tmp_path / "images", *map(str, five.shape), tmp_path / "out", python.path, python.path)
    close(np.fromfile(tmp_path / "out"), written(python(five.double())))


def failure(consumer: Path, memory: str, package: Path, folder: Path, *size: int) -> str:
    """What the consumer says of one image of zeros."""
    shape = (1, 3, *(size or SHAPE[1:]))
    np.zeros(shape, np.float32).tofile(folder / "images")
    command = [consumer, memory, "1", folder / "images", *map(str, shape), folder / "out", package]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    return result.stderr


def test_an_installed_program_that_fails(consumer: Path, predicted_package: Path, tmp_path: Path) -> None:
    said = failure(consumer, "host", predicted_package, tmp_path, 8, 8)
    assert said.startswith("consumer: images: expected shape [B, 3, 16, 24], got [1, 3, 8, 8]")
    said = failure(consumer, "device", predicted_package, tmp_path)
    message = "images: expected host memory, as the package runs on cpu, got device memory; copy the images to"
    assert said.startswith(f"consumer: {message}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("memory", ["host", "device"])
def test_a_package_of_cuda_without_it(
    consumer: Path, altered: Callable[..., Path], tmp_path: Path, memory: str
) -> None:
    said = failure(consumer, memory, altered(device="cuda", backend="composite"), tmp_path)
    reasons = r"torch sees no CUDA device|the torch in .* is built without CUDA"
    assert re.match(f"consumer: package: .*was exported for cuda, but ({reasons}); export one on the CPU", said), said


@pytest.mark.parametrize("suffix", ["ppm", "png"])
def test_the_example(build: Path, session: Any, predicted_package: Path, tmp_path: Path, suffix: str) -> None:
    program = build / "examples" / "cpp" / "explain"
    if suffix == "png" and "libpng" not in run("ldd", program):
        pytest.skip("built without libpng")
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (40, 90, 3), dtype=np.uint8))
    picture.save(tmp_path / f"picture.{suffix}")
    printed = run(program, predicted_package, tmp_path / f"picture.{suffix}", tmp_path / "out.png")
    found = session.explain(np.asarray(picture))
    target = int(found.targets[0])
    assert printed.startswith(f"class {target} ({session.class_names[target]}), logit {found.values[0]:.4f}\n")
    row, column = divmod(int(found.relevance.argmax()), GRID[1])
    assert f"row {row}, column {column} of {GRID[0]} x {GRID[1]}" in printed
    with Image.open(tmp_path / "out.png") as overlay:
        overlay.load()
        assert (overlay.size, overlay.mode) == (SHAPE[:0:-1], "RGB")
        painted = np.asarray(overlay).astype(int)
    heat, view = found.heatmap()[0], np.asarray(PREPROCESS.view(picture)).astype(int)
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    assert np.abs(painted[y, x] - (view[y, x] + np.array([255, 63, 0])) // 2).max() <= 1  # red where most relevant


def test_the_example_says_what_is_wrong(build: Path, predicted_package: Path, tmp_path: Path) -> None:
    (tmp_path / "short.ppm").write_bytes(b"P6 # wide\n4 4 255\nabc")
    command = [build / "examples" / "cpp" / "explain", predicted_package, tmp_path / "short.ppm", tmp_path / "out.png"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.strip().endswith("short.ppm: the PPM file is truncated")


def ppm(pixels: Any) -> bytes:  # [H, W, 3]
    return b"P6\n%d %d\n255\n" % (pixels.shape[1], pixels.shape[0]) + pixels.tobytes()


def test_frames_through_a_pipe(build: Path, session: Any, predicted_package: Path) -> None:
    """Frames of any sizes; the maps are the float32 of those that the session gives, whatever the package's batch."""
    draw = np.random.default_rng(5)
    frames = [draw.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((40, 90), (24, 16), (40, 90))]
    command = [build / "examples" / "cpp" / "stream", predicted_package]
    done = subprocess.run(command, input=b"".join(map(ppm, frames)), capture_output=True, check=True)
    head, size = b"Pf\n%d %d\n-1.0\n" % GRID[::-1], 4 * GRID[0] * GRID[1]
    assert len(done.stdout) == len(frames) * (len(head) + size)
    for number, frame in enumerate(frames):
        place = number * (len(head) + size)
        assert done.stdout[place : place + len(head)] == head
        found = np.frombuffer(done.stdout, "<f4", GRID[0] * GRID[1], place + len(head)).reshape(GRID)[::-1]
        np.testing.assert_array_equal(found.ravel(), session.explain(frame).relevance[0].astype(np.float32))
    assert re.fullmatch(r"3 frames, milliseconds for one: p50 .*, p99 .*, most .*\n", done.stderr.decode())


@pytest.mark.parametrize(
    ("frames", "given", "said"),
    [
        (b"P6\n2 2\n255\n" + bytes(11), [], "the PPM file is truncated"),
        (b"P", [], "the last frame is truncated"),
        (b"GIF89a", [], "expected frames in the format PPM (P6)"),
        (b"P6\n2 2\n255\n" + bytes(12), ["1"], "targets: this package explains the predicted class"),
    ],
)
def test_frames_that_are_refused(
    build: Path, predicted_package: Path, frames: bytes, given: list[str], said: str
) -> None:
    command = [build / "examples" / "cpp" / "stream", predicted_package, *given]
    done = subprocess.run(command, input=frames, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (1, b"") and said in done.stderr.decode()


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
