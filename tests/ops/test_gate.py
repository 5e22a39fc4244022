"""Gate against the reference: medians, ties, degenerate rows, registration."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fga_fast import ops, reference


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("patches", (1, 2, 17, 50, 196, 197, 201, 256, 257, 577, 1025, 4096))
def test_patch_counts(patches: int, dtype: torch.dtype) -> None:
    scores = torch.randn(3, patches, dtype=dtype)
    torch.testing.assert_close(ops.gate(scores, 10.0, 1.0), reference.gate(scores, 10.0, 1.0))


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=50), base=st.floats(0.1, 20), slope=st.floats(-3, 3))
def test_any_scores(values: list[float], base: float, slope: float) -> None:
    scores = torch.tensor([values], dtype=torch.float64)
    got = ops.gate(scores, base, slope)
    torch.testing.assert_close(got, reference.gate(scores, base, slope), rtol=1e-10, atol=1e-12)
    low, high = sorted((base, 1 / base))
    assert bool(((got >= low * (1 - 1e-12)) & (got <= high * (1 + 1e-12))).all())


def test_the_median_is_the_lower_one() -> None:
    # median of 1 2 3 40 is 2, deviations 1 0 1 38, their lower median 1: z = -1, 0, 1, 38 over 1.4826 (1 + 1e-8)
    gates = ops.gate(torch.tensor([[40.0, 1.0, 3.0, 2.0]], dtype=torch.float64), 10.0, 1.0)
    z = torch.tensor([[38.0, -1.0, 1.0, 0.0]], dtype=torch.float64) / (1.4826 * (1 + 1e-8))
    torch.testing.assert_close(gates, 10 ** torch.tanh(z), rtol=1e-12, atol=0)


def test_equal_scores_are_not_gated() -> None:
    assert torch.equal(ops.gate(torch.full((2, 9), 3.25), 10.0, 1.0), torch.ones(2, 9))


def test_ties_in_most_patches_saturate_the_rest() -> None:
    scores = torch.zeros(1, 10, dtype=torch.float64)
    scores[0, 3], scores[0, 4] = 5, -5
    gates = ops.gate(scores, 10.0, 1.0)[0]
    assert gates[3] == pytest.approx(10) and gates[4] == pytest.approx(0.1) and gates[0] == 1


def test_nan_gives_nan_in_its_row_only() -> None:
    scores = torch.randn(2, 30)
    scores[0, 7] = float("nan")
    gates = ops.gate(scores, 10.0, 1.0)
    assert bool(gates[0].isnan().all()) and bool(gates[1].isfinite().all())


def test_rows_do_not_depend_on_threads() -> None:
    scores, before, found = torch.randn(33, 70), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(ops.gate(scores, 10.0, 1.0))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_strides_and_emptiness() -> None:
    scores = torch.randn(40, 6, dtype=torch.float64)
    assert torch.equal(ops.gate(scores.t(), 10.0, 1.0), ops.gate(scores.t().contiguous(), 10.0, 1.0))
    assert ops.gate(torch.zeros(0, 5)).shape == (0, 5)
    assert ops.gate(torch.zeros(5, 0)).shape == (5, 0)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.fga_fast.gate, (torch.randn(2, 7), 10.0, 1.0))


def test_gate_refuses_to_be_differentiated() -> None:
    with pytest.raises(RuntimeError, match="has no gradient"):
        ops.gate(torch.randn(1, 4, requires_grad=True)).sum().backward()


def test_bad_arguments_are_named() -> None:
    with pytest.raises(RuntimeError, match=r"scores must be \[M, P\], got shape \[3\]"):
        ops.gate(torch.zeros(3))
    with pytest.raises(RuntimeError, match="scores must be float32 or float64, got float16"):
        ops.gate(torch.zeros(1, 3, dtype=torch.float16))
    with pytest.raises(RuntimeError, match="base must be positive"):
        ops.gate(torch.zeros(1, 3), base=0.0)
