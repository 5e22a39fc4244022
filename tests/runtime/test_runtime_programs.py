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
from PIL import Image
from runtime_package import BATCH, GRID, HEIGHT, LAYER, MARKS, PREPROCESS, SHAPE, WIDTH, close, expected, run

ROOT = Path(__file__).resolve().parents[2]
pytest_plugins = ("runtime_fixtures",)
pytestmark = MARKS


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


def test_python_beside_fga_fast(build: Path, package: Path) -> None:
    """Whoever loads the operators first, they are registered once."""
    code = f"""
import sys; sys.path.insert(0, {str(build / "python")!r})
import fga_fast, fga_runtime
fga_runtime.Session({str(package)!r})
print(fga_fast.load_package({str(package)!r}).metadata.batch)
"""
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == str(BATCH)


def test_an_installed_program_in_threads(consumer: Path, package: Path, tmp_path: Path) -> None:
    """Two sessions of one process, three threads each, five images in batches of three."""
    images = torch.randn(5, *SHAPE)
    images.numpy().tofile(tmp_path / "images")
    run(consumer, "host", "3", tmp_path / "images", *map(str, images.shape), tmp_path / "out", package, package)
    python = expected(images)
    assert python.values is not None
    parts = [python.logits, python.targets, python.values, python.relevance]
    parts += [python.scores[LAYER], python.gates[LAYER], python.heatmap()]
    close(np.fromfile(tmp_path / "out"), torch.cat([part.double().flatten() for part in parts]))


def failure(consumer: Path, memory: str, package: Path, folder: Path, *side: int) -> str:
    """What the consumer says of one image of zeros."""
    np.zeros((1, 3, *side), np.float32).tofile(folder / "images")
    command = [consumer, memory, "1", folder / "images", "1", "3", *map(str, side), folder / "out", package]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    return result.stderr


def test_an_installed_program_that_fails(consumer: Path, package: Path, tmp_path: Path) -> None:
    message = "consumer: images: expected shape [B, 3, 32, 48], got [1, 3, 8, 8]"
    assert failure(consumer, "host", package, tmp_path, 8, 8).startswith(message)


def test_device_memory_for_a_package_of_the_cpu(consumer: Path, package: Path, tmp_path: Path) -> None:
    message = (
        "consumer: images: expected host memory, as the package runs on cpu, got device memory; copy the images to"
    )
    assert failure(consumer, "device", package, tmp_path, HEIGHT, WIDTH).startswith(message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("memory", ["host", "device"])
def test_a_package_of_cuda_without_it(
    consumer: Path, altered: Callable[..., Path], tmp_path: Path, memory: str
) -> None:
    said = failure(consumer, memory, altered(device="cuda", backend="composite"), tmp_path, HEIGHT, WIDTH)
    reasons = r"torch sees no CUDA device|the torch in .* is built without CUDA"
    assert re.match(f"consumer: package: .*was exported for cuda, but ({reasons}); export one on the CPU", said), said


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
