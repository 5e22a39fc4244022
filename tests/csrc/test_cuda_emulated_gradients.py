"""The fused CUDA kernel of gradients and relevance, run on the CPU by the emulation of tests/csrc/native."""

from __future__ import annotations

import os
import shutil

import emulated
import pytest
import torch
from explicit_attention import Problem, explicit, problem
from torch import Tensor

pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")

DTYPES = (torch.bfloat16, torch.float16)
# Norm-wise. Probabilities, dS and the results are rounded to 16 bits, as in PyTorch's kernels; relevance is not.
TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


def sized(dtype: torch.dtype, queries: int, width: int, keys: int | None = None, **sizes: int) -> Problem:
    return problem(queries=queries, keys=queries if keys is None else keys, width=width, dtype=dtype, **sizes)


def check(
    p: Problem, bias: Tensor | None = None, image: Tensor | None = None, residual: bool = False, signed: bool = False,
    need_qk: bool = True, order: str = "forward", copies_at_once: bool = False, row_tolerance: float = 3e-6,
) -> tuple[Tensor, ...]:  # fmt: skip
    scale = 1.7 * p.q.shape[-1] ** -0.5
    logits = p.q.double() @ p.k.double().transpose(-2, -1) * scale
    logits = logits if bias is None else logits + bias.double()
    lse, out = logits.logsumexp(-1).float(), (logits.softmax(-1) @ p.v.double()).to(p.q.dtype)
    got = emulated.attention_gradients(
        p.grad_out, p.row, p.gate, p.q, p.k, p.v, bias, out, lse, image, scale, residual, signed, need_qk, order=order,
        copies_at_once=copies_at_once,
    )  # fmt: skip
    want = explicit(p, scale, bias, image=image, residual=residual, signed=signed)
    for name, value in zip(("dq", "dk", "dv"), got[:3], strict=True):
        if need_qk or name == "dv":
            expected = getattr(want, name)
            error = (value.double() - expected).norm() / expected.norm().clamp(min=1e-3)
            assert error < TOLERANCE[p.q.dtype], f"{name}: relative error {error:.1e}"
    error = (got[3].double() - want.row).abs().max() / want.row.abs().max()
    assert error < row_tolerance, f"row: relative error {error:.1e}"
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", (1, 2, 17, 50, 65))
def test_small_any_number_of_tokens(dtype: torch.dtype, tokens: int) -> None:
    check(sized(dtype, tokens, 64, images=1, heads=2), residual=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", (197, 256))
def test_whole_heads(dtype: torch.dtype, tokens: int) -> None:
    emulated.library().emulated_shared_bytes()
    check(sized(dtype, tokens, 64, images=1, heads=1), residual=True)
    assert 0 < emulated.library().emulated_shared_bytes() <= 163 * 1024  # what a block of sm_80 may have


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", (8, 16, 32, 40, 56))
def test_every_head_width(dtype: torch.dtype, width: int) -> None:
    check(sized(dtype, 41, width, images=1, heads=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_targets_share_an_image(dtype: torch.dtype) -> None:
    p = sized(dtype, 19, 32, images=2, heads=2, rows=5)
    image = torch.tensor([1, 0, 1, 1, 0])
    check(p, image=image)
    check(p, image=image, bias=torch.randn(2, 1, 19, 19))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((2, 2, 19, 23), (1, 1, 1, 23), (1, 2, 19, 1)))
def test_bias(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check(sized(dtype, 19, 32, keys=23, images=2, heads=2), bias=torch.randn(shape))
    check(sized(dtype, 19, 64, keys=23, images=2, heads=2), bias=torch.randn(shape).to(dtype))


def test_masked_and_absent_keys_get_nothing() -> None:
    """Logits near -200 make exp(0 - lse) of a key past the end infinite: it must not meet its zeros."""
    bias = torch.full((1, 1, 19, 19), -200.0)
    bias[..., 5] = float("-inf")
    _, dk, dv, row = check(sized(torch.bfloat16, 19, 32, images=1), bias=bias, row_tolerance=3e-5)
    assert all(bool((t[:, :, 5] == 0).all()) for t in (dk, dv)) and bool((row[:, 5] == 0).all())


@pytest.mark.parametrize("queries", (1, 3, 70))
def test_fewer_queries_than_keys(queries: int) -> None:
    check(sized(torch.bfloat16, queries, 64, keys=130, images=1, heads=2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_values_only(dtype: torch.dtype) -> None:
    p = sized(dtype, 70, 64, images=1, heads=2)
    everything, some = check(p, signed=True), check(p, signed=True, need_qk=False)
    assert torch.equal(everything[2], some[2]) and torch.equal(everything[3], some[3])
    assert len(some[0]) == len(some[1]) == 0


def test_an_image_that_is_not_there_gives_nan() -> None:
    p = sized(torch.bfloat16, 20, 32, images=2, heads=2, rows=3)
    image, lse = torch.tensor([1, 2, -1]), torch.zeros(2, 2, 20)
    got = emulated.attention_gradients(
        p.grad_out, p.row, None, p.q, p.k, p.v, None, p.q, lse, image, 0.2, False, False, True
    )
    for t in got:
        assert t.isnan().flatten(1).all(1).tolist() == t.isnan().flatten(1).any(1).tolist() == [False, True, True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("need_qk", (False, True))
def test_same_bits_in_any_order_of_threads(dtype: torch.dtype, need_qk: bool) -> None:
    """Threads between two barriers run in any order, and copies arrive early or late: a race would show."""
    p = sized(dtype, 197, 64, images=1, heads=1)
    first = check(p, need_qk=need_qk)
    for order, at_once in (("forward", True), ("backward", False), ("shuffled", False), ("shuffled", True)):
        again = check(p, need_qk=need_qk, order=order, copies_at_once=at_once)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize(
    ("dtype", "tokens", "width"), ((torch.float32, 5, 32), (torch.bfloat16, 257, 8), (torch.bfloat16, 5, 72))
)
def test_what_does_not_fit_is_refused(dtype: torch.dtype, tokens: int, width: int) -> None:
    with pytest.raises(RuntimeError, match="does not fit"):
        check(sized(dtype, tokens, width, images=1, heads=1))


def test_rows_without_any_image_are_refused() -> None:
    """A row of an image that does not exist is worked out on image 0, so there must be one."""
    p = sized(torch.bfloat16, 5, 32, images=1, heads=1)
    q, lse, image = torch.empty(0, 1, 5, 32, dtype=torch.bfloat16), torch.empty(0, 1, 5), torch.tensor([0])
    with pytest.raises(RuntimeError, match="does not fit"):
        emulated.attention_gradients(p.grad_out, p.row, None, q, q, q, None, q, lse, image, 0.2, False, False, True)
