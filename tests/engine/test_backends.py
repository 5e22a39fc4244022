"""Which implementations are chosen where, without any device: only names and reasons are looked at."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from fga_fast import composite, ops
from fga_fast.engine import backends

ROOT = Path(__file__).resolve().parents[2]

CPU, CUDA, OTHER = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands for the package of Triton kernels, and a CUDA object that has loaded."""
    module = types.SimpleNamespace(score=object(), gate=object())
    monkeypatch.setitem(sys.modules, "fga_fast.kernels", module)
    monkeypatch.setattr(ops, "cuda_error", lambda: "")
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
    return module


def test_auto_takes_native_kernels_on_the_cpu() -> None:
    assert backends.choose("auto", CPU) == backends.Choice("native", backends.NATIVE)


def test_kernels_that_never_ran_are_left_by_auto_and_taken_on_request(kernels: Any) -> None:
    choice = backends.choose("auto", CUDA)
    reason = "the CUDA kernels have not been measured on a device yet"
    assert choice == backends.Choice("composite", backends.COMPOSITE, reason)
    assert backends.choose("native", CUDA).stages == (ops.attention, kernels.score, ops.gate)
    assert backends.choose("triton", CUDA).stages == (composite.attention, kernels.score, kernels.gate)


def test_measured_kernels_are_taken_by_auto(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "CUDA_MEASURED", True)
    assert backends.choose("auto", CUDA).stages == (ops.attention, kernels.score, ops.gate)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("backend", "device", "dtype", "reason"),
    (
        ("triton", CPU, torch.float32, "Triton kernels run on CUDA devices only, the model is on cpu"),
        ("native", OTHER, torch.float32, "on CPU and CUDA devices only, the model is on meta"),
        ("native", CUDA, torch.float64, "the model is float64"),
        ("triton", CUDA, torch.float64, "the model is float64"),
    ),
)
def test_an_explicit_choice_never_falls_back(
    backend: Any, device: torch.device, dtype: torch.dtype, reason: str
) -> None:
    with pytest.raises(RuntimeError, match=f"backend: {backend} cannot run: .*{reason}"):
        backends.choose(backend, device, dtype)
    if backend == "native":
        choice = backends.choose("auto", device, dtype)
        assert choice.name == "composite" and reason in choice.reason


def test_obstacles_are_said(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, _: not name.endswith("gate"))
    with pytest.raises(RuntimeError, match="no CUDA kernel for gate; build it with FGA_FAST_CUDA=1"):
        backends.choose("native", CUDA)
    monkeypatch.setattr(ops, "cuda_error", lambda: "libcudart.so.13 is missing")
    assert "libcudart.so.13 is missing" in backends.choose("auto", CUDA).reason
    assert backends.choose("triton", CUDA).stages is not None  # which needs no CUDA object

    monkeypatch.setitem(sys.modules, "fga_fast.kernels", None)  # importing it raises
    with pytest.raises(RuntimeError, match=r"the Triton kernels do not load: import of fga_fast\.kernels halted"):
        backends.choose("triton", CUDA)


def test_the_folder_of_kernels_is_not_a_package_of_that_name() -> None:
    """With a source tree on the path, transformers finds it when it asks for the package `kernels`."""
    pytest.importorskip("triton")
    code = (
        "import sys\n"
        "import kernels\n"
        "assert not hasattr(kernels, 'score') and 'kernels.score' not in sys.modules\n"
        "from fga_fast.kernels import score\n"
        "assert callable(score)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)


def test_operators_that_are_there_already_are_not_loaded_again() -> None:
    """As in a process whose C++ session came first; registering an operator twice ends the process."""
    code = (
        "import ctypes, importlib.util, os, torch\n"
        "path = os.environ.get('FGA_FAST_LIBRARY') or importlib.util.find_spec('fga_fast._C').origin\n"
        "ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)\n"
        "from fga_fast import ops\n"
        "assert torch.equal(ops.gate(torch.ones(1, 3)), torch.ones(1, 3))\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)
