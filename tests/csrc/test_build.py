"""The build: what is compiled, what is packaged, and that importing the package stays light."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
import torch

import fga_fast
from fga_fast.settings import Activation, Normalisation

ROOT = Path(__file__).resolve().parents[2]


def load(script: str) -> ModuleType:
    """A script as a module, without running it."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def build() -> ModuleType:
    return load("setup.py")


def fresh_python(code: str) -> str:
    """What a new interpreter prints."""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_one_version_everywhere() -> None:
    project = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert project is not None and fga_fast.__version__ == project[1]
    with contextlib.suppress(metadata.PackageNotFoundError):  # not installed: a checkout that was built in place
        assert metadata.version("fga_fast") == project[1]


def test_every_native_source_is_in_exactly_one_object(build: ModuleType) -> None:
    listed = build.sources("core") + build.sources("cuda")
    on_disk = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in (".cpp", ".cu") and "runtime" not in path.parts  # the C++ session, which only CMake builds
    }
    assert len(listed) == len(set(listed))
    assert set(listed) == on_disk


def test_every_file_of_the_package_is_installed(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "FGA_FAST_CUDA": "0"}, check=True, capture_output=True)
    built = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert built == load("scripts/check_wheel.py").shipped()


def test_the_enums_of_the_score_have_the_order_of_the_settings() -> None:
    header = (ROOT / "csrc" / "cpu" / "score.h").read_text(encoding="utf-8")
    enums = {name: tuple(values.split(", ")) for name, values in re.findall(r"enum class (\w+) .*{ (.*) };", header)}
    assert enums == {"Activation": get_args(Activation), "Normalisation": ("none", *get_args(Normalisation))}


def test_import_loads_neither_triton_nor_the_native_library() -> None:
    after_torch = set(fresh_python("import sys, torch; print(*sys.modules)").split())
    after_both = set(fresh_python("import sys, torch, fga_fast; print(*sys.modules)").split())
    new = after_both - after_torch
    assert not [name for name in new if name.split(".")[0] in ("triton", "timm", "torchvision", "matplotlib")]
    assert not {"fga_fast._C", "fga_fast._cuda"} & new
    assert fresh_python("import fga_fast, torch; print(torch.cuda.is_initialized())").strip() == "False"


def test_native_library_is_abi3_and_has_the_schemas() -> None:
    native = importlib.import_module("fga_fast._C")
    assert native.__file__ is not None
    assert native.__file__.endswith(".abi3.so")
    for op in ("attention", "attention_backward", "score", "gate"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fga_fast::{op}", "CPU"), op


def test_cuda_switch(build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FGA_FAST_CUDA", "0")
    assert build.wanted_toolkit(tmp_path) is None
    monkeypatch.setenv("FGA_FAST_CUDA", "auto")
    assert build.wanted_toolkit(None) is None
    monkeypatch.setenv("FGA_FAST_CUDA", "1")
    with pytest.raises(SystemExit, match="FGA_FAST_CUDA=1 asks for CUDA kernels, but"):
        build.wanted_toolkit(None)
    monkeypatch.setenv("FGA_FAST_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 0, 1 or auto, got 'yes'"):
        build.wanted_toolkit(None)


def test_sources_refuses_a_line_that_matches_nothing(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "sources.txt").write_text("core missing/*.cpp\n", encoding="utf-8")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"missing/\*\.cpp' matches no file"):
        build.sources("core")
