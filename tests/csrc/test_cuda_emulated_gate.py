"""The CUDA gate kernel, run on the CPU by the emulation of tests/csrc/native, against the reference."""

from __future__ import annotations

import os
import shutil

import emulated
import pytest
import torch

from fga_fast import reference

pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")


def check(scores: torch.Tensor, base: float = 10.0, slope: float = 1.0) -> torch.Tensor:
    got = emulated.gate(scores, base, slope)
    tolerance = 1e-11 if scores.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(
        got.double(), reference.gate(scores.double(), base, slope), rtol=tolerance, atol=tolerance, equal_nan=True
    )
    for order in emulated.ORDERS[1:]:
        assert torch.equal(emulated.gate(scores, base, slope, order).nan_to_num(-1), got.nan_to_num(-1))
    return got


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("patches", (1, 2, 17, 196, 257, 1000))
def test_small_any_number_of_patches(patches: int, dtype: torch.dtype) -> None:
    check(torch.randn(2, patches, dtype=dtype))


def test_small_ties_signs_and_zeros() -> None:
    check(torch.full((2, 9), 3.25))
    check(torch.tensor([[40.0, 1.0, 3.0, 2.0], [-0.0, 0.0, -0.0, 0.0], [-1.0, -2.0, -2.0, -3.0]], dtype=torch.float64))
    check(torch.randint(-2, 3, (2, 196)).double(), base=2.0, slope=-0.5)


def test_small_nan_stays_in_its_row() -> None:
    scores = torch.randn(2, 30)
    scores[0, 7] = float("nan")
    gates = check(scores)
    assert bool(gates[0].isnan().all()) and bool(gates[1].isfinite().all())
