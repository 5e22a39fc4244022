"""The CUDA gate kernel against the reference. Needs a CUDA device; has never run on one."""

from __future__ import annotations

import os

import pytest
import torch

from fga_fast import ops, reference

REQUIRED = os.environ.get("FGA_FAST_REQUIRE_CUDA") == "1"

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available() and not REQUIRED, reason="no CUDA device"),
]


def check(scores: torch.Tensor, base: float = 10.0, slope: float = 1.0) -> None:
    """Same as the reference in float64 on the CPU, and as the native CPU kernel."""
    got = ops.gate(scores.cuda(), base, slope)
    assert got.is_cuda and got.dtype == scores.dtype and got.shape == scores.shape
    want = reference.gate(scores.double(), base, slope)
    tolerance = 1e-11 if scores.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(got.cpu().double(), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.cpu(), ops.gate(scores, base, slope), rtol=tolerance, atol=tolerance)


def test_the_cuda_library_is_loaded() -> None:
    assert torch.cuda.is_available()
    assert ops.cuda_error() == ""
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fga_fast::gate", "CUDA")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("patches", (1, 2, 17, 50, 196))
def test_small(patches: int, dtype: torch.dtype) -> None:
    check(torch.randn(3, patches, dtype=dtype))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("patches", (197, 255, 256, 257, 1024, 4096, 70_000))
@pytest.mark.parametrize("rows", (1, 64))
def test_large(rows: int, patches: int, dtype: torch.dtype) -> None:
    check(torch.randn(rows, patches, dtype=dtype))


def test_many_rows() -> None:
    check(torch.randn(70_000, 5))


@pytest.mark.parametrize(("base", "slope"), ((10.0, 1.0), (2.0, -0.5), (0.1, 3.0)))
def test_small_base_and_slope(base: float, slope: float) -> None:
    check(torch.randn(2, 37, dtype=torch.float64), base, slope)


def test_small_ties_signs_and_zeros() -> None:
    check(torch.full((2, 9), 3.25))
    check(torch.tensor([[40.0, 1.0, 3.0, 2.0], [-0.0, 0.0, -0.0, 0.0], [-1.0, -2.0, -2.0, -3.0]], dtype=torch.float64))
    check(torch.randint(-2, 3, (5, 196)).double())


def test_small_nan_stays_in_its_row() -> None:
    scores = torch.randn(2, 30)
    scores[0, 7] = float("nan")
    gates = ops.gate(scores.cuda()).cpu()
    assert bool(gates[0].isnan().all()) and bool(gates[1].isfinite().all())


def test_small_strides_and_emptiness() -> None:
    scores = torch.randn(40, 6, dtype=torch.float64).cuda()
    assert torch.equal(ops.gate(scores.t()), ops.gate(scores.t().contiguous()))
    assert ops.gate(torch.zeros(0, 5, device="cuda")).shape == (0, 5)
    assert ops.gate(torch.zeros(5, 0, device="cuda")).shape == (5, 0)


def test_same_bits_every_time() -> None:
    scores = torch.randn(64, 4096).cuda()
    first = ops.gate(scores)
    assert all(torch.equal(ops.gate(scores), first) for _ in range(20))


def test_small_runs_on_the_current_stream() -> None:
    scores = torch.randn(8, 196)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        on_device = scores.cuda(non_blocking=True)
        gates = ops.gate(on_device)
    stream.synchronize()
    torch.testing.assert_close(gates.cpu(), reference.gate(scores, 10.0, 1.0), rtol=2e-5, atol=2e-5)


def test_small_captured_in_a_graph() -> None:
    scores = torch.randn(8, 196, device="cuda")
    ops.gate(scores)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gates = ops.gate(scores)
    scores.copy_(torch.randn(8, 196))
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(gates.cpu(), reference.gate(scores.cpu(), 10.0, 1.0), rtol=2e-5, atol=2e-5)
