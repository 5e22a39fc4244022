"""The CUDA attention kernels, compiled for the CPU and run thread by thread (tests/csrc/native), against the reference.

What this cannot show is speed, and what only a real device does; tests/ops/test_attention_cuda.py is for those.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import torch
from explicit_attention import Problem, problem
from torch import Tensor

from fga_fast import reference

pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")

TOLERANCE = (
    3e-6  # of the largest relevance: 16-bit kernels multiply the very numbers that the reference gets, in float32
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def sized(dtype: torch.dtype, queries: int, width: int, keys: int | None = None, **sizes: int) -> Problem:
    p = problem(queries=queries, keys=queries if keys is None else keys, width=width, dtype=dtype, **sizes)
    return p._replace(row=p.row.float(), gate=p.gate.float())


def log_sum_exp(p: Problem, scale: float, bias: Tensor | None) -> Tensor:
    logits = p.q.double() @ p.k.double().transpose(-2, -1) * scale
    return (logits if bias is None else logits + bias.double()).logsumexp(-1).float()


def expected(p: Problem, scale: float, bias: Tensor | None, image: Tensor | None, signed: bool) -> Tensor:
    q, k, v, grad_out, row, gate = (t.double() for t in p)
    wide = None if bias is None else bias.double().expand(len(q), q.shape[1], q.shape[2], k.shape[2])
    return reference.attention_backward(grad_out, row, gate, q, k, v, image, scale, bias=wide, signed=signed)[3]


def check(
    p: Problem, bias: Tensor | None = None, image: Tensor | None = None, signed: bool = False, order: str = "forward",
    copies_at_once: bool = False,
) -> Tensor:  # fmt: skip
    scale = 1.7 * p.q.shape[-1] ** -0.5
    got = emulated.attention_relevance(
        p.grad_out, p.row, p.gate, p.q, p.k, p.v, bias, log_sum_exp(p, scale, bias), image, scale, signed, order=order,
        copies_at_once=copies_at_once,
    )  # fmt: skip
    want = expected(p, scale, bias, image, signed)
    error = (got.double() - want).abs().max() / want.abs().max()
    assert error < TOLERANCE, f"relative error {error:.1e}"
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", (1, 2, 17, 50, 65))
def test_small_any_number_of_tokens(dtype: torch.dtype, tokens: int) -> None:
    check(sized(dtype, tokens, 64, images=1, heads=2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_tiles_of_keys_and_queries(dtype: torch.dtype) -> None:
    check(sized(dtype, 197, 64, images=1, heads=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", (8, 32, 40, 72, 80, 96, 104, 128))
def test_every_head_width(dtype: torch.dtype, width: int) -> None:
    emulated.library().emulated_shared_bytes()
    check(sized(dtype, 41, width, images=1, heads=1))
    # Twice on a multiprocessor of sm_90 (228 KB), once on one of sm_80 (164 KB), less 1 KB a block for the system.
    limit = 113 if dtype != torch.float32 else 163
    assert 0 < emulated.library().emulated_shared_bytes() <= limit * 1024


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_targets_share_an_image(dtype: torch.dtype) -> None:
    p = sized(dtype, 19, 32, images=2, heads=2, rows=5)
    image = torch.tensor([1, 0, 1, 1, 0])
    check(p, image=image)
    check(p, image=image, bias=torch.randn(2, 1, 19, 19))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((2, 2, 19, 23), (1, 1, 1, 23), (1, 2, 19, 1), (2, 1, 1, 23)))
def test_bias(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    bias = torch.randn(shape)
    check(sized(dtype, 19, 32, keys=23, images=2, heads=2), bias=bias)
    check(sized(dtype, 19, 32, keys=23, images=2, heads=2), bias=bias.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_keys_get_nothing(dtype: torch.dtype) -> None:
    bias = torch.zeros(1, 1, 19, 19)
    bias[..., 5] = float("-inf")
    assert bool((check(sized(dtype, 19, 32, images=1), bias=bias)[:, 5] == 0).all())


def test_small_signed() -> None:
    p = sized(torch.bfloat16, 50, 64, images=1)
    signed = check(p, signed=True)
    assert bool((signed < 0).any()) and bool((check(p) >= 0).all())


@pytest.mark.parametrize("queries", (1, 3, 70))
def test_fewer_queries_than_keys(queries: int) -> None:
    check(sized(torch.bfloat16, queries, 64, keys=130, images=1, heads=2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arriving", ((0,), (63,), (64,), (150, 196), (10, 140)))
def test_tiles_without_relevance_are_skipped(dtype: torch.dtype, arriving: tuple[int, ...]) -> None:
    """Skipped, not multiplied by zero: NaN in the gradient there does not come through."""
    p = sized(dtype, 197, 32, images=1, heads=1)
    row = torch.zeros_like(p.row)
    row[:, arriving] = 1.5
    p = p._replace(row=row)
    check(p)
    quiet = set(range(4)) - {i // 64 for i in arriving}
    grad_out = p.grad_out.clone()
    for tile in quiet:
        grad_out[:, :, tile * 64 : (tile + 1) * 64] = float("nan")
    lse = log_sum_exp(p, 0.2, None)
    got = emulated.attention_relevance(grad_out, row, None, p.q, p.k, p.v, None, lse, None, 0.2, False)
    assert bool(got.isfinite().all())


def test_no_relevance_at_all() -> None:
    p = sized(torch.float32, 70, 32, images=1, heads=1)
    lse = log_sum_exp(p, 0.2, None)
    none = torch.zeros_like(p.row)
    got = emulated.attention_relevance(p.grad_out, none, p.gate, p.q, p.k, p.v, None, lse, None, 0.2, False)
    assert bool((got == 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_not_hidden(dtype: torch.dtype) -> None:
    p = sized(dtype, 20, 32, images=2, heads=1)
    p.grad_out[1, 0, 3, 7] = float("nan")
    lse = log_sum_exp(p, 0.2, None)
    got = emulated.attention_relevance(p.grad_out, p.row, None, p.q, p.k, p.v, None, lse, None, 0.2, False)
    assert bool(got[0].isfinite().all()) and bool(got[1].isnan().all())


def test_an_image_that_is_not_there_gives_nan() -> None:
    p = sized(torch.bfloat16, 20, 32, images=2, heads=2, rows=3)
    lse, image = log_sum_exp(p, 0.2, None), torch.tensor([1, 2, -1])
    got = emulated.attention_relevance(p.grad_out, p.row, None, p.q, p.k, p.v, None, lse, image, 0.2, False)
    assert got.isnan().all(1).tolist() == [False, True, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_of_q_k_v(dtype: torch.dtype) -> None:
    """Heads before tokens, and slices of one [B, N, 3, H, D] projection: same bits as from dense memory."""
    p = sized(dtype, 33, 40, images=2, heads=3)
    packed = torch.stack([t.transpose(1, 2) for t in p[:3]], dim=2)  # [B, N, 3, H, D]
    q, k, v = (packed[:, :, i].transpose(1, 2) for i in range(3))
    dense = p._replace(q=p.q.contiguous(), k=p.k.contiguous(), v=p.v.contiguous(), grad_out=p.grad_out.contiguous())
    assert torch.equal(check(p._replace(q=q, k=k, v=v)), check(dense))
    shared = p._replace(q=p.q[:1].expand(2, -1, -1, -1))
    check(shared)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_any_order_of_threads(dtype: torch.dtype) -> None:
    """Threads between two barriers run in any order, and copies arrive early or late: a race would show."""
    p = sized(dtype, 197, 64, images=1, heads=1)
    first = check(p)
    for order in emulated.ORDERS:
        for at_once in (False, True):
            assert torch.equal(check(p, order=order, copies_at_once=at_once), first)


@pytest.mark.parametrize("blocks", (1, 2, 3, 4, 6, 8))
def test_tiles_are_read_without_bank_conflicts(blocks: int) -> None:
    """What eight lanes read at once lies in eight different groups of four banks, however a kernel reads a tile."""
    at = emulated.library().emulated_chunk_offset
    offsets = {(r, c): at(blocks, r, c) for r in range(64) for c in range(4 * blocks)}
    assert sorted(offsets.values()) == [16 * i for i in range(64 * 4 * blocks)]
    for r in range(0, 64, 8):
        for c in range(0, 4 * blocks, 4):
            for pair in range(r, r + 8, 2):  # four chunks of a block in two rows: left and right factors
                assert len({offsets[row, c + t] % 128 for row in (pair, pair + 1) for t in range(4)}) == 8
            for t in range(4):  # the same chunk of eight rows
                assert len({offsets[row, c + t] % 128 for row in range(r, r + 8)}) == 8


def test_what_does_not_fit_is_refused() -> None:
    p = sized(torch.float32, 4, 136, images=1)
    with pytest.raises(RuntimeError, match="does not fit"):
        check(p)


@pytest.mark.skipif("FGA_FAST_EMULATED" in os.environ, reason="already inside")
def test_under_sanitizers(tmp_path: Path) -> None:
    """The small cases again in a build that stops at an access outside of a buffer and at undefined behaviour."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(library).is_file() for library in libraries):
        pytest.skip("no sanitizers beside this compiler")
    built = tmp_path / "libemulated.so"
    emulated.build(built, emulated.SANITIZE)
    environment = {
        **os.environ, "FGA_FAST_EMULATED": str(built), "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0", "UBSAN_OPTIONS": "print_stacktrace=1",
    }  # fmt: skip
    files = [str(path) for path in sorted(Path(__file__).parent.glob("test_cuda_emulated*.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys", "-k", "small", *files]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " passed" in result.stdout
