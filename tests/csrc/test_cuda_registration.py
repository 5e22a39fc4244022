"""The CUDA ops without a GPU: who is registered for what, shapes and layouts on fake CUDA tensors, and the Python side
of the attention op with PyTorch's CUDA kernels replaced by softmaxes that check how they are called.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import emulated
import pytest
import torch
from explicit_attention import Problem, explicit, problem
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fga_fast import ops
from fga_fast.ops import attention_cuda

ATEN = (
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_efficient_attention_backward",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    ops.load()


def test_the_cuda_object_registers_the_kernels() -> None:
    """Loading the object is what registers. FGA_FAST_CUDA=1 demands that there is one."""
    try:
        importlib.import_module("fga_fast._cuda")
    except ImportError as error:
        if os.environ.get("FGA_FAST_CUDA") == "1":
            raise
        pytest.skip(f"no CUDA object for this torch: {error}")
    ops.load()
    for op in ("gate", "attention_relevance", "attention", "attention_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fga_fast::{op}", "CUDA"), op


def test_the_python_side_registers_for_cuda() -> None:
    """In an interpreter of its own: in this one a build without CUDA object must go on looking like one."""
    code = """
import torch
from fga_fast import ops
from fga_fast.ops import attention_cuda
ops.load()
attention_cuda.register()
attention_cuda.register()
print([torch._C._dispatch_has_kernel_for_dispatch_key(f"fga_fast::{op}", "CUDA")
       for op in ("attention", "attention_backward")])
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[True, True]"


@pytest.mark.parametrize("name", ATEN)
def test_pytorch_has_the_kernels_that_attention_calls(name: str) -> None:
    op = getattr(torch.ops.aten, name).default
    assert "scale" in str(op._schema)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_fake_cuda_tensors(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        q = torch.empty(2, 50, 3, 64, device="cuda", dtype=dtype).transpose(1, 2)
        carrier = torch.empty(2, 50, device="cuda")
        out, lse, carried, port = torch.ops.fga_fast.attention(q, q, q, carrier, None, 0.125, True, False, False)
        assert {t.device.type for t in (out, lse, carried, port)} == {"cuda"}
        assert out.shape == (2, 3, 50, 64) and out.transpose(1, 2).is_contiguous() and out.dtype == dtype
        assert lse.shape == (2, 3, 50) and lse.dtype == torch.float32
        grad_out, image = torch.empty(4, 3, 50, 64, device="cuda", dtype=dtype), torch.empty(4, device="cuda").long()
        row = torch.empty(4, 50, device="cuda")
        dq, dk, dv, row_out = torch.ops.fga_fast.attention_backward(
            grad_out, row, row, q, q, q, None, out, lse, image, 0.125, False, False, True
        )
        assert dq.shape == dk.shape == (0,) and dv.shape == (4, 3, 50, 64) and row_out.shape == (4, 50)
        left = torch.ops.fga_fast.attention_relevance(grad_out, row, None, q, q, q, None, lse, image, 0.125, False)
        assert left.shape == (4, 50) and left.device.type == "cuda"


@pytest.mark.parametrize("biased", (False, True))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_pytorch_takes_the_calls(dtype: torch.dtype, biased: bool) -> None:
    """The Python side itself on fake tensors: PyTorch's schemas and shape functions see every argument."""
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        q = torch.empty(2, 3, 50, 64, device="cuda", dtype=dtype)
        bias = torch.empty(2, 1, 1, 50, device="cuda") if biased else None
        settings = (0.125, False, False, False)
        out, lse, *_ = attention_cuda.attention(q, q, q, torch.empty(2, 50, device="cuda"), bias, *settings)
        assert out.transpose(1, 2).is_contiguous() and lse.is_contiguous() and lse.shape == (2, 3, 50)
        for image in (None, torch.empty(4, device="cuda").long()):
            rows = 2 if image is None else 4
            grad_out, row = (
                torch.empty(rows, 3, 50, 64, device="cuda", dtype=dtype),
                torch.empty(rows, 50, device="cuda"),
            )
            outputs = attention_cuda.attention_backward(
                grad_out, row, None, q, q, q, bias, out, lse, image, 0.125, False, True, True
            )
            assert all(t.shape == grad_out.shape and t.transpose(1, 2).is_contiguous() for t in outputs[:3])
            assert outputs[3].shape == (rows, 50)


def softmax(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    logits = q.float() @ k.float().transpose(-2, -1) * scale
    logits = logits if bias is None else logits + bias.float()
    return logits.softmax(-1), logits.logsumexp(-1)


def gradients(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, ...]:
    for t in (q, k, v, grad_out, out):
        assert t.stride(-1) == 1 and t.dtype == q.dtype
    maps, want = softmax(q, k, bias, scale)
    torch.testing.assert_close(lse, want, rtol=1e-5, atol=1e-5)  # of this very call's logits
    torch.testing.assert_close((maps @ v.float()).to(q.dtype), out, rtol=2e-2, atol=2e-2)
    weighted = maps * (grad_out.float() @ v.float().transpose(-2, -1))
    ds = (weighted - maps * weighted.sum(-1, keepdim=True)) * scale
    parts = ds @ k.float(), ds.transpose(-2, -1) @ q.float(), maps.transpose(-2, -1) @ grad_out.float()
    return tuple(t.to(q.dtype) for t in parts)


def flash(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool, debug: bool, *, scale: float
) -> tuple[Any, ...]:
    assert q.dtype in (torch.float16, torch.bfloat16) and (dropout, causal, debug) == (0.0, False, False) and q.numel()
    maps, lse = softmax(q, k, None, scale)
    return (maps @ v.float()).to(q.dtype), lse, None, None, q.shape[2], k.shape[2], None, None, None


def flash_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, first_q: None, first_k: None,
    queries: int, keys: int, dropout: float, causal: bool, seed: Tensor, offset: Tensor, *, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert (queries, keys, dropout, causal) == (q.shape[2], k.shape[2], 0.0, False) and lse.is_contiguous()
    return gradients(grad_out, q, k, v, None, out, lse, scale)


def check_bias(bias: Tensor | None, q: Tensor, k: Tensor) -> None:
    if bias is not None:
        assert bias.shape == (*q.shape[:3], k.shape[2]) and bias.dtype == q.dtype and bias.stride(3) == 1
        assert all(bias.stride(dim) % 16 == 0 for dim in range(3)) and bias.data_ptr() % 16 == 0


def efficient(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, with_lse: bool, *, scale: float
) -> tuple[Tensor, ...]:
    assert with_lse and q.numel()
    check_bias(bias, q, k)
    maps, lse = softmax(q, k, bias, scale)
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))
    return (maps @ v.float()).to(q.dtype), padded, torch.empty(0), torch.empty(0)


def efficient_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, seed: Tensor,
    offset: Tensor, dropout: float, wanted: list[bool], *, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    check_bias(bias, q, k)
    assert dropout == 0.0 and lse.shape[-1] % 32 == 0 and lse.is_contiguous() and not wanted[3]
    assert bool((lse[..., q.shape[2] :] == float("inf")).all())
    assert out.transpose(1, 2).is_contiguous()  # the kernel takes H * D for the distance of two tokens, whatever it is
    assert q.numel() and k.numel()  # it divides by the number of heads of all images
    parts = gradients(grad_out, q, k, v, bias, out, lse[..., : q.shape[2]], scale)
    return (*(t if want else torch.empty(0) for t, want in zip(parts, wanted[:3], strict=True)), torch.empty(0))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's CUDA kernels by a softmax, the relevance kernel by its emulation."""
    replacements: tuple[Callable[..., Any], ...] = (flash, flash_backward, efficient, efficient_backward)
    for name, replacement in zip(ATEN, replacements, strict=True):
        monkeypatch.setattr(torch.ops.aten, name, replacement)
    monkeypatch.setattr(torch.ops.fga_fast, "attention_relevance", emulated.attention_relevance)


def run(
    p: Problem, bias: Tensor | None, image: Tensor | None, signed: bool = False, need: tuple[bool, bool] = (True, True)
) -> tuple[Tensor, ...]:
    scale = p.q.shape[-1] ** -0.5
    settings = (scale, True, signed, False)
    out, lse, carried, port = attention_cuda.attention(p.q, p.k, p.v, p.carrier, bias, *settings)
    assert carried.shape == p.q.shape[:1] + p.q.shape[2:3] and port.shape == p.carrier.shape
    return out, *attention_cuda.attention_backward(
        p.grad_out, p.row, p.gate, p.q, p.k, p.v, bias, out, lse, image, scale, signed, *need
    )


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("shape", (None, (1, 1, 1, 21), (2, 3, 21, 21), (2, 1, 21, 1)))
@pytest.mark.parametrize("rows", (2, 5))
def test_against_the_softmax_written_out(dtype: torch.dtype, shape: tuple[int, ...] | None, rows: int) -> None:
    p = problem(queries=21, keys=21, width=16, rows=rows, dtype=dtype)
    image = None if rows == 2 else torch.tensor([1, 0, 1, 1, 0])
    bias = None if shape is None else torch.randn(shape).to(dtype)
    got = run(p, bias, image)
    want = explicit(p, p.q.shape[-1] ** -0.5, bias, image=image)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    of_rows = got[0] if image is None else got[0][image]
    for value, expected in zip((of_rows, *got[1:]), want, strict=True):
        torch.testing.assert_close(value.double(), expected.double(), rtol=tolerance, atol=tolerance)
    assert all(t.transpose(1, 2).is_contiguous() for t in got[:4])


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_only_what_is_needed(dtype: torch.dtype) -> None:
    p = problem(queries=3, keys=21, width=16, dtype=dtype)
    everything = run(p, None, None)
    for need_qk, need_v in ((False, True), (True, False), (False, False)):
        _, dq, dk, dv, row_out = run(p, None, None, need=(need_qk, need_v))
        assert torch.equal(row_out, everything[4])
        assert torch.equal(dq, everything[1]) and torch.equal(dk, everything[2]) if need_qk else len(dq) == len(dk) == 0
        assert torch.equal(dv, everything[3]) if need_v else len(dv) == 0


@pytest.mark.usefixtures("on_cpu")
def test_layouts_that_kernels_cannot_read_are_copied() -> None:
    """Every second head-width entry, and memory that starts two bytes off an alignment of 16."""
    p = problem(queries=21, keys=21, width=32, dtype=torch.bfloat16)
    off = torch.empty(p.k.numel() + 1, dtype=torch.bfloat16)[1:].view(p.k.shape).copy_(p.k)
    p = p._replace(q=p.q[..., ::2], k=off[..., :16], v=p.v[..., :16], grad_out=p.grad_out[..., :16])
    assert p.q.stride(-1) == 2 and off.data_ptr() % 16 == 2
    got = run(p, None, None)
    want = explicit(p, 0.25)
    torch.testing.assert_close(got[4].double(), want.row.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1].double(), want.dq, rtol=3e-2, atol=3e-2)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("biased", (False, True))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_outputs_of_any_layout(dtype: torch.dtype, biased: bool) -> None:
    """Head-major outputs, as folding K sets of images into one batch leaves them: same gradients."""
    p = problem(queries=21, keys=21, width=16, dtype=dtype)
    bias = torch.randn(2, 1, 1, 21).to(dtype) if biased else None
    out, lse, *_ = attention_cuda.attention(p.q, p.k, p.v, p.carrier, bias, 0.25, True, False, False)
    first, second = (
        attention_cuda.attention_backward(
            p.grad_out, p.row, p.gate, p.q, p.k, p.v, bias, t, lse, None, 0.25, False, True, True
        )
        for t in (out, out.contiguous())
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize(("images", "tokens"), ((0, 5), (2, 0)))
def test_nothing_to_explain(dtype: torch.dtype, images: int, tokens: int) -> None:
    """No images or no tokens: PyTorch's kernels are not asked, and shapes and layouts are those of the fake kernels."""
    p = problem(images=images, queries=tokens, keys=tokens, width=16, dtype=dtype)
    out, dq, dk, dv, row = run(p, None, None)
    assert all(t.shape == p.q.shape and t.dtype == dtype for t in (out, dq, dk, dv)) and row.shape == p.row.shape


@pytest.mark.usefixtures("on_cpu")
def test_outputs_that_are_not_needed_are_apart() -> None:
    p = problem(queries=5, keys=5, width=16, dtype=torch.float32)
    outputs = run(p, None, None, need=(False, False))[1:4]
    assert len({id(t) for t in outputs}) == 3


@pytest.mark.parametrize(("dtype", "width"), ((torch.float64, 64), (torch.float32, 12), (torch.bfloat16, 136)))
def test_what_kernels_do_not_take_is_named(dtype: torch.dtype, width: int) -> None:
    p = problem(queries=5, keys=5, width=width, dtype=dtype)
    with pytest.raises(RuntimeError, match=rf"heads of width 8 to 128 in steps of 8, got q of shape .*{width}\] in "):
        attention_cuda.attention(p.q, p.k, p.v, p.carrier, None, 1.0, False, False, False)


def test_shapes_that_do_not_fit_are_named() -> None:
    p = problem(queries=5, keys=7, width=16, dtype=torch.float32)
    flags = (1.0, False, False, False)
    with pytest.raises(RuntimeError, match=r"expected q \[B, H, Nq, D\] and k, v .* v \[2, 3, 6, 16\]"):
        attention_cuda.attention(p.q, p.k, p.v[:, :, 1:], p.carrier, None, *flags)
    with pytest.raises(RuntimeError, match=r"carrier must be float32 of shape \[2, 7\], got torch.float32 \[2, 6\]"):
        attention_cuda.attention(p.q, p.k, p.v, p.carrier[:, 1:], None, *flags)
