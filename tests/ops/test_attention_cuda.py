"""Tapped attention on CUDA against the reference in float64. Needs a CUDA device; has never run on one.

`-k small` are the cases for compute-sanitizer.
"""

from __future__ import annotations

import os

import pytest
import torch
from explicit_attention import Problem, Step, explicit, problem
from torch import Tensor

from fga_fast import ops

REQUIRED = os.environ.get("FGA_FAST_REQUIRE_CUDA") == "1"

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available() and not REQUIRED, reason="no CUDA device"),
]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Norm-wise, of outputs and gradients: PyTorch's kernels round probabilities to 16 bits. And of the relevance that
# leaves: rounding of log-sum-exp, which each has in float32.
GRADIENT = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
RELEVANCE = {torch.bfloat16: 1e-4, torch.float16: 1e-4, torch.float32: 1e-5}


def on_device(p: Problem) -> Problem:
    """The same strides, on the device."""
    return Problem(*(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda").copy_(t) for t in p))


def run(
    p: Problem, bias: Tensor | None = None, image: Tensor | None = None, signed: bool = False, need_qk: bool = True,
    need_v: bool = True,
) -> Step:  # fmt: skip
    scale = p.q.shape[-1] ** -0.5
    out, lse, _, _ = ops.attention(p.q, p.k, p.v, p.carrier, scale=scale, bias=bias, signed=signed)
    return Step(
        out,
        *ops.attention_backward(
            p.grad_out, p.row, p.gate, p.q, p.k, p.v, out, lse, scale=scale, bias=bias, image=image, signed=signed,
            need_qk=need_qk, need_v=need_v,
        ),
    )  # fmt: skip


def norm_error(got: Tensor, want: Tensor) -> float:
    return float((got.cpu().double() - want).norm() / want.norm().clamp(min=1e-30))


def check(p: Problem, bias: Tensor | None = None, image: Tensor | None = None, signed: bool = False) -> None:
    want = explicit(p, p.q.shape[-1] ** -0.5, bias, image=image, signed=signed)
    got = run(on_device(p), None if bias is None else bias.cuda(), None if image is None else image.cuda(), signed)
    dtype = p.q.dtype
    out = got.out if image is None else got.out[image.cuda()]
    errors = {"out": norm_error(out, want.out), "row": norm_error(got.row, want.row.double())}
    errors |= {name: norm_error(getattr(got, name), getattr(want, name)) for name in ("dq", "dk", "dv")}
    limits = {name: RELEVANCE[dtype] if name == "row" else GRADIENT[dtype] for name in errors}
    assert {name: e for name, e in errors.items() if not e < limits[name]} == {}
    assert got.row.dtype == torch.float32 and got.dq.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", (2, 17, 50, 65))
def test_small(dtype: torch.dtype, tokens: int) -> None:
    check(problem(queries=tokens, keys=tokens, width=64, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", (8, 32, 40, 64, 72, 80, 88, 96, 104, 128))
def test_every_head_width(dtype: torch.dtype, width: int) -> None:
    check(problem(queries=197, keys=197, width=width, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", (577, 1370))
def test_large(dtype: torch.dtype, tokens: int) -> None:
    check(problem(heads=12, queries=tokens, keys=tokens, width=64, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_targets_share_an_image(dtype: torch.dtype) -> None:
    image = torch.tensor([1, 0, 1, 1, 0])
    check(problem(queries=50, keys=50, width=64, rows=5, dtype=dtype), image=image)
    check(problem(queries=50, keys=50, width=64, rows=5, dtype=dtype), torch.randn(2, 1, 1, 50).to(dtype), image)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((2, 3, 50, 50), (1, 3, 1, 50), (2, 1, 50, 1)))
def test_small_bias(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check(problem(queries=50, keys=50, width=64, dtype=dtype), torch.randn(shape).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", (1, 3))
def test_small_fewer_queries_than_keys(dtype: torch.dtype, queries: int) -> None:
    check(problem(queries=queries, keys=70, width=64, dtype=dtype))


def test_small_signed() -> None:
    check(problem(queries=50, keys=50, width=64, dtype=torch.bfloat16), signed=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_layouts(dtype: torch.dtype) -> None:
    """Slices of a [B, N, 3, H, D] projection, dense heads, and a width that must be copied: same relevance bits."""
    p = on_device(problem(queries=50, keys=50, width=64, dtype=dtype))
    packed = torch.stack([t.transpose(1, 2) for t in p[:3]], dim=2)
    q, k, v = (packed[:, :, i].transpose(1, 2) for i in range(3))
    apart = torch.stack((p.k, p.v), dim=-1)
    first = run(p).row
    for other in (
        p._replace(q=q, k=k, v=v), p._replace(q=p.q.contiguous(), grad_out=p.grad_out.contiguous()),
        p._replace(k=apart[..., 0], v=apart[..., 1]),
    ):  # fmt: skip
        torch.testing.assert_close(run(other).row, first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_outputs_of_any_layout(dtype: torch.dtype) -> None:
    """PyTorch's memory-efficient backward reads a head-major output as if it were token-major."""
    p = on_device(problem(queries=50, keys=50, width=64, dtype=dtype))
    out, lse, _, _ = ops.attention(p.q, p.k, p.v, p.carrier, scale=0.125)
    first, second = (
        ops.attention_backward(p.grad_out, p.row, p.gate, p.q, p.k, p.v, t, lse, scale=0.125)
        for t in (out, out.contiguous())
    )
    for got, want in zip(second, first, strict=True):
        assert norm_error(got, want.cpu().double()) < GRADIENT[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_no_images_or_tokens(dtype: torch.dtype) -> None:
    for images, tokens in ((0, 5), (2, 0)):
        p = on_device(problem(images=images, queries=tokens, keys=tokens, width=16, dtype=dtype))
        got = run(p)
        assert all(t.shape == p.q.shape for t in (got.out, got.dq, got.dk, got.dv)) and got.row.shape == p.row.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_time(dtype: torch.dtype) -> None:
    p = on_device(problem(images=8, heads=12, queries=197, keys=197, width=64, dtype=dtype))
    out, lse, _, _ = ops.attention(p.q, p.k, p.v, p.carrier, scale=0.125)

    def row() -> Tensor:
        return ops.attention_backward(
            p.grad_out, p.row, p.gate, p.q, p.k, p.v, out, lse, scale=0.125, need_qk=False, need_v=False
        )[3]

    first = row()
    assert all(torch.equal(row(), first) for _ in range(20))


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_relevance_at_one_query(dtype: torch.dtype) -> None:
    p = problem(queries=197, keys=197, width=64, dtype=dtype)
    row = torch.zeros_like(p.row)
    row[:, 0] = 1.0
    check(p._replace(row=row))


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_only_what_is_needed(dtype: torch.dtype) -> None:
    p = on_device(problem(queries=50, keys=50, width=64, dtype=dtype))
    everything = run(p)
    for need_qk, need_v in ((False, True), (True, False), (False, False)):
        got = run(p, need_qk=need_qk, need_v=need_v)
        assert torch.equal(got.row, everything.row)
        assert len(got.dv) == (2 if need_v else 0) and len(got.dq) == len(got.dk) == (2 if need_qk else 0)


def test_small_through_autograd_and_many_targets() -> None:
    p = on_device(problem(queries=50, keys=50, width=64, rows=2, dtype=torch.float32))
    q, k, v, carrier = (t.clone().requires_grad_() for t in (p.q, p.k, p.v, p.carrier))
    out, _, carried, port = ops.attention(q, k, v, carrier, scale=0.125, gated=True)
    seeds = [torch.stack((t, 2 * t)) for t in (p.grad_out, p.row, p.gate)]
    both = torch.autograd.grad([out, carried, port], [q, k, v, carrier], seeds, is_grads_batched=True)
    want = run(p)
    for got, expected in zip(both[:3], (want.dq, want.dk, want.dv), strict=True):
        torch.testing.assert_close(got[0], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[1], 2 * expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[3][0], want.row, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both[3][1], 8 * want.row, rtol=1e-4, atol=1e-5)


def test_small_captured_in_a_graph() -> None:
    p = on_device(problem(queries=50, keys=50, width=64, dtype=torch.bfloat16))
    for _ in range(2):
        run(p)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(p)
    p.grad_out.mul_(-1)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(got.row, run(p).row)


def test_small_runs_on_the_current_stream() -> None:
    p = problem(queries=50, keys=50, width=64, dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        row = run(on_device(p)).row
    stream.synchronize()
    want = explicit(p, 0.125).row
    assert norm_error(row, want.double()) < RELEVANCE[torch.bfloat16]


@pytest.mark.parametrize(("dtype", "width"), ((torch.float64, 64), (torch.float32, 12), (torch.bfloat16, 136)))
def test_small_refusals_name_shape_dtype_and_capability(dtype: torch.dtype, width: int) -> None:
    """float64 may go another way in the public op; the kernel itself has no float64."""
    p = on_device(problem(queries=5, keys=5, width=width, dtype=dtype))
    lse = torch.zeros(2, 3, 5, device="cuda")
    with pytest.raises(RuntimeError, match=r"attention_relevance: .*\[2, 3, 5, \d+\].* compute capability \d+\.\d"):
        torch.ops.fga_fast.attention_relevance(
            p.grad_out, p.row.float(), None, p.q, p.k, p.v, None, lse, None, 1.0, False
        )


def test_small_no_memory_of_tokens_by_tokens() -> None:
    tokens = 4096
    p = on_device(problem(images=1, heads=1, queries=tokens, keys=tokens, width=64, dtype=torch.bfloat16))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(p)
    assert torch.cuda.max_memory_allocated() - before < tokens * tokens  # bytes; a map alone is twice that
