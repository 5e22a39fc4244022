"""The build: what is compiled, what is packaged, and that importing the package stays light."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fga_fast"


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """setup.py as a module; nothing is built by importing it."""
    spec = importlib.util.spec_from_file_location("fga_fast_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def project_version() -> str:
    match = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert match is not None
    return match[1]


def fresh_python(code: str) -> str:
    """What a new interpreter prints."""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_one_version_everywhere() -> None:
    fga_fast = importlib.import_module("fga_fast")
    assert fga_fast.__version__ == project_version()
    try:
        installed = metadata.version("fga_fast")
    except metadata.PackageNotFoundError:
        return  # run from a checkout that was built in place
    assert installed == project_version()


def test_every_native_source_is_in_exactly_one_object(build: ModuleType) -> None:
    listed = build.sources("core") + build.sources("cuda")
    on_disk = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in (".cpp", ".cu") and "runtime" not in path.parts  # the C++ session, which only CMake builds
    }
    assert len(listed) == len(set(listed))
    assert set(listed) == on_disk
    assert not [path for path in build.sources("core") if path.endswith(".cu")]


def test_cmake_reads_the_same_list() -> None:
    """CMakeLists.txt takes a line by this expression; setup.py by splitting it. Both must see the same patterns."""
    lines = (ROOT / "csrc" / "sources.txt").read_text(encoding="utf-8").splitlines()
    assert 'REGEX REPLACE "^${object} +([^ #]+).*"' in (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    for line in lines:
        fields = line.split("#", 1)[0].split()
        if fields:
            match = re.match(r"^(core|cuda) +([^ #]+)", line)
            assert match is not None
            assert [*match.groups()] == fields


def test_every_folder_of_python_files_is_packaged(build: ModuleType) -> None:
    names, folders = build.packages()
    expected = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in PACKAGE.rglob("*.py")}
    assert expected <= set(names)
    assert ("fga_fast.kernels" in names) == (ROOT / "kernels" / "__init__.py").is_file()
    assert folders["fga_fast"] == "fga_fast"


def test_every_data_file_is_packaged() -> None:
    """Data is packaged by suffix; a file with another suffix would be left out of the wheel without a word."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r'^"\*" = \[(.*)\]', text, re.MULTILINE)
    assert match is not None
    patterns = re.findall(r'"([^"]+)"', match[1])
    assert (PACKAGE / "py.typed").is_file()
    built = {".py", ".pyc", ".so"}
    data = [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in built]
    assert [path for path in data if not any(path.match(pattern) for pattern in patterns)] == []


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


def test_cuda_object_registers_its_kernels() -> None:
    """Needs no GPU: loading the object is what registers. FGA_FAST_CUDA=1 demands that there is one."""
    importlib.import_module("fga_fast._C")
    try:
        importlib.import_module("fga_fast._cuda")
    except ImportError as error:
        if os.environ.get("FGA_FAST_CUDA") == "1":
            raise
        pytest.skip(f"no CUDA object for this torch: {error}")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fga_fast::gate", "CUDA")


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


def test_a_folder_without_headers_is_no_toolkit(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.find_toolkit() != tmp_path
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    assert build.find_toolkit() == tmp_path
    # Its nvcc cannot run, so its version is unknown and fits no torch.
    assert build.cuda_obstacle(tmp_path) is not None


def test_sources_refuses_a_line_that_matches_nothing(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "sources.txt").write_text("core missing/*.cpp\n", encoding="utf-8")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"missing/\*\.cpp' matches no file"):
        build.sources("core")
