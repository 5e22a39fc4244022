"""The project of the C++ session, built by CMake and installed, and sessions of small packages.

FGA_FAST_CMAKE_BUILD names a build folder to use instead of a new one; it must be of this source tree, with
-DFGA_FAST_PYBIND=ON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from session_case import ROOT, run

from fga_fast import Package, load_package


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built project."""
    if given := os.environ.get("FGA_FAST_CMAKE_BUILD"):
        return Path(given)
    pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("cmake")
    torch_root = Path(torch.__file__).parent
    options = [f"-DFGA_FAST_TORCH={torch_root}", "-DFGA_FAST_PYBIND=ON", f"-DPython3_EXECUTABLE={sys.executable}"]
    run("cmake", "-S", ROOT, "-B", folder, "-DBUILD_TESTING=OFF", *options)  # doctest need not be there
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
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="session")
def session(module: Any, predicted_package: Path) -> Any:
    return module.Session(predicted_package)


@pytest.fixture(scope="session")
def python(predicted_package: Path) -> Package:
    """The same package in Python."""
    return load_package(predicted_package)


@pytest.fixture
def altered(predicted_package: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the package with other metadata."""

    def alter(**changes: Any) -> Path:
        copy = Path(shutil.copy(predicted_package, tmp_path / "altered.pt2"))
        about = json.loads(predicted_package.with_suffix(".json").read_text(encoding="utf-8"))
        copy.with_suffix(".json").write_text(json.dumps({**about, **changes}), encoding="utf-8")
        return copy

    return alter
