"""The emulation of tests/csrc/native finds what it says it finds."""

from __future__ import annotations

import ctypes
import os
import shutil

import emulated
import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")

KERNELS = ("right", "without_wait", "without_barrier", "barrier_for_some", "lanes_apart", "unaligned_copy")


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("broken") / "libbroken.so"
    emulated.build(path, ("-O1",), sources=[emulated.ROOT / "tests" / "csrc" / "native" / "broken_kernels.cpp"])
    library = ctypes.CDLL(str(path))
    library.run_broken.restype = ctypes.c_char_p
    return library


def run(library: ctypes.CDLL, kernel: str, order: str = "forward", copies_at_once: bool = False) -> Tensor:
    numbers, out = torch.arange(64.0), torch.zeros(64)
    pointers = ctypes.c_void_p(numbers.data_ptr()), ctypes.c_void_p(out.data_ptr())
    failure = library.run_broken(
        KERNELS.index(kernel), *pointers, emulated.ORDERS.index(order), int(copies_at_once)
    ).decode()
    if failure:
        raise RuntimeError(failure)
    return out


@pytest.mark.parametrize("order", emulated.ORDERS)
@pytest.mark.parametrize("copies_at_once", (False, True))
def test_a_kernel_without_mistakes(broken: ctypes.CDLL, order: str, copies_at_once: bool) -> None:
    assert torch.equal(run(broken, "right", order, copies_at_once), torch.arange(64.0).flip(0))


def test_a_copy_that_was_not_waited_for(broken: ctypes.CDLL) -> None:
    assert bool(run(broken, "without_wait").isnan().any())
    assert bool(run(broken, "without_wait", copies_at_once=True).isfinite().all())


def test_a_missing_barrier(broken: ctypes.CDLL) -> None:
    forward, backward = (run(broken, "without_barrier", order) for order in ("forward", "backward"))
    assert bool(forward.isnan().any()) and not torch.equal(forward.nan_to_num(-1), backward.nan_to_num(-1))


@pytest.mark.parametrize(
    ("kernel", "message"),
    (
        ("barrier_for_some", "wait forever in __syncthreads"),
        ("lanes_apart", "met in __shfl_xor_sync and in __any_sync"),
        ("unaligned_copy", "copy_async of 16 bytes between unaligned addresses"),
    ),
)
def test_what_a_device_does_not_forgive(broken: ctypes.CDLL, kernel: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(broken, kernel)


def test_the_list_of_kernels_is_that_of_the_build() -> None:
    """Every .cu file is run by the emulation: none is left untested."""
    found = {path.stem for path in (emulated.ROOT / "csrc" / "cuda").glob("*.cu")}
    assert found == set(emulated.KERNELS)
