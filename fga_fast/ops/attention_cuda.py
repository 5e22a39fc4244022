"""Tapped attention on CUDA: PyTorch's kernels compute the attention, a kernel of this project the relevance.

Forward is PyTorch's flash attention (16-bit, no bias) or its memory-efficient attention (float32, or a bias), the two
that return log-sum-exp. Backward, the same one's gradients for dq, dk, dv, and `fga_fast::attention_relevance` for the
row. Nothing of size N x N is kept.

STATUS: has never run on a device.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fga_fast.precision import relevance_dtype

WIDEST_HEAD = 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_READ = 16  # bytes that kernels read at once: alignment of every row
_BIAS_ROW = 16  # elements; the memory-efficient kernel wants the rows of a bias that far apart
_LSE_ROW = 32  # queries; the memory-efficient kernel wants log-sum-exp padded to a multiple


def check_supported(op: str, q: Tensor) -> None:  # [B, H, Nq, D]
    """Refuses dtypes and head widths that the kernels do not take.

    Raises:
        RuntimeError: dtype or head width; the message says what to use instead.
    """
    width = q.shape[-1]
    if q.dtype in DTYPES and 0 < width <= WIDEST_HEAD and width % 8 == 0:
        return
    capability = ".".join(map(str, torch.cuda.get_device_capability(q.device))) if torch.cuda.is_available() else "?"
    raise RuntimeError(
        f"{op}: CUDA kernels take float32, bfloat16 and float16 with heads of width 8 to {WIDEST_HEAD} in steps of 8, "
        f"got q of shape {list(q.shape)} in {q.dtype} on {q.device} (compute capability {capability}); "
        'use backend="composite", which takes all'
    )


def uses_flash(q: Tensor, bias: Tensor | None) -> bool:
    """Which of PyTorch's kernels: flash attention takes 16-bit numbers and no bias."""
    return bias is None and q.dtype != torch.float32


def readable(t: Tensor) -> Tensor:  # [B, H, N, D]
    """The tensor itself if kernels can read its rows 16 bytes at a time, as in all usual layouts; else a copy."""
    step = _READ // t.element_size()
    strides = [stride for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True) if size > 1]
    if t.stride(-1) == 1 and t.data_ptr() % _READ == 0 and all(stride % step == 0 for stride in strides):
        return t
    dense = t.contiguous()
    return dense if dense.data_ptr() % _READ == 0 else dense.clone()


def token_major(t: Tensor) -> Tensor:  # [B, H, N, D]
    """Over memory [B, N, H, D], as fake kernels say; a copy only where PyTorch chose another layout."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _zeros(like: Tensor, wanted: bool = True) -> Tensor:  # [B, H, N, D]
    """Zeros of that shape over token-major memory; [0] unless wanted."""
    images, heads, tokens, width = like.shape
    return like.new_zeros(images, tokens, heads, width).transpose(1, 2) if wanted else like.new_empty(0)


def placed_bias(bias: Tensor, q: Tensor, keys: int) -> Tensor:  # [B or 1, H or 1, Nq or 1, N or 1]
    """Bias [B, H, Nq, N] as the memory-efficient kernel wants it: in q's dtype, keys contiguous, rows aligned."""
    bias = bias.to(q.dtype).expand(*bias.shape[:3], keys)
    padded = F.pad(bias, (0, -keys % _BIAS_ROW)).contiguous()[..., :keys]
    return padded.expand(q.shape[0], q.shape[1], q.shape[2], keys)


def attention(
    q: Tensor, k: Tensor, v: Tensor, carrier: Tensor, bias: Tensor | None, scale: float, gated: bool, signed: bool,
    constant_map: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`fga_fast::attention` for CUDA tensors; see `ops.attention`."""
    check_supported("attention", q)
    check_shapes("attention", q, k, v, carrier)
    carried, port = carrier.new_zeros(len(q), q.shape[2]), carrier.new_zeros(len(q), k.shape[2])
    if q.numel() == 0 or k.numel() == 0:
        return _zeros(q), q.new_full(q.shape[:3], float("-inf"), dtype=carrier.dtype), carried, port
    q, k, v = readable(q), readable(k), readable(v)
    if uses_flash(q, bias):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)[:2]
    else:
        mask = None if bias is None else placed_bias(bias, q, k.shape[2])
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, scale=scale)[:2]
    return token_major(out), lse[..., : q.shape[2]].contiguous(), carried, port


def attention_backward(
    grad_out: Tensor, row: Tensor, gate: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
    out: Tensor, lse: Tensor, image: Tensor | None, scale: float, signed: bool, need_qk: bool, need_v: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`fga_fast::attention_backward` for CUDA tensors; see `ops.attention_backward`.

    `image` is not checked for indices out of range, as that would wait for the device.
    """
    check_supported("attention_backward", q)
    if grad_out.numel() == 0 or k.numel() == 0:  # PyTorch's kernels would divide by the number of heads
        of_keys, left = grad_out.new_empty(*grad_out.shape[:2], *k.shape[2:]), row.new_zeros(len(row), k.shape[2])
        return _zeros(grad_out, need_qk), _zeros(of_keys, need_qk), _zeros(of_keys, need_v), left
    q, k, v, grad_out, out = (readable(t) for t in (q, k, v, grad_out, out))
    if bias is not None:
        bias = bias.to(q.dtype)  # as the forward pass had it: log-sum-exp belongs to this one
    row_out = torch.ops.fga_fast.attention_relevance(grad_out, row, gate, q, k, v, bias, lse, image, scale, signed)
    dq, dk, dv = (q.new_empty(0) for _ in range(3))
    if need_qk or need_v:
        if image is not None:
            q, k, v, out, lse = (t[image] for t in (q, k, v, out, lse))
            bias = bias if bias is None or bias.shape[0] == 1 else bias[image]
        gradients = _gradients(grad_out, q, k, v, bias, out, lse, scale, need_qk, need_v)
        dq, dk, dv = (
            token_major(t) if wanted else q.new_empty(0)
            for t, wanted in zip(gradients, (need_qk, need_qk, need_v), strict=True)
        )
    return dq, dk, dv, row_out


def _gradients(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, scale: float,
    need_qk: bool, need_v: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv from PyTorch's kernel that goes with the forward pass."""
    queries, keys = q.shape[2], k.shape[2]
    # There is no dropout, so the state of the random numbers is not read.
    seed = offset = torch.empty(2, dtype=torch.int64, device=q.device)
    if uses_flash(q, bias):
        seed = seed.view(torch.uint64)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad_out, q, k, v, out, lse.contiguous(), None, None, queries, keys, 0.0, False, seed, offset, scale=scale
        )
        return dq, dk, dv
    out = token_major(out)  # the kernel knows no other distance of two tokens, and does not check
    mask = None if bias is None else placed_bias(bias, q, keys)
    padded = F.pad(lse, (0, -queries % _LSE_ROW), value=float("inf")).contiguous()
    dq, dk, dv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        grad_out, q, k, v, mask, out, padded, seed, offset, 0.0, [need_qk, need_qk, need_v, False], scale=scale
    )
    return dq, dk, dv


def check_shapes(op: str, q: Tensor, k: Tensor, v: Tensor, carrier: Tensor) -> None:
    """Checks the forward pass, whose errors PyTorch's kernels do not name. `attention_relevance` checks the backward.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; the message names the argument.
    """
    keys = [q.shape[0], q.shape[1], k.shape[2], q.shape[3]] if q.dim() == 4 and k.dim() == 4 else []
    for name, t in (("k", k), ("v", v)):
        if list(t.shape) != keys or t.dtype != q.dtype or t.device != q.device:
            raise RuntimeError(
                f"{op}: expected q [B, H, Nq, D] and k, v [B, H, N, D] of one dtype on one device, got q "
                f"{list(q.shape)} {q.dtype} {q.device} and {name} {list(t.shape)} {t.dtype} {t.device}"
            )
    if list(carrier.shape) != [q.shape[0], k.shape[2]] or carrier.dtype != relevance_dtype(q.dtype):
        raise RuntimeError(
            f"{op}: carrier must be float32 of shape {[q.shape[0], k.shape[2]]}, got {carrier.dtype} "
            f"{list(carrier.shape)}"
        )


def _relevance_fake(
    grad_out: Tensor, row: Tensor, gate: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
    lse: Tensor, image: Tensor | None, scale: float, signed: bool,
) -> Tensor:  # fmt: skip
    return row.new_empty(row.shape[0], k.shape[2])


def register_fake() -> None:
    """Shapes of `fga_fast::attention_relevance`, which has no other kernel than CUDA's. Needs no CUDA object."""
    torch.library.register_fake("fga_fast::attention_relevance", _relevance_fake)


@functools.cache
def register() -> None:
    """Makes this file the CUDA kernels of the attention ops. Needs the CUDA object as soon as one is called."""
    torch.library.impl("fga_fast::attention", "CUDA", attention)
    torch.library.impl("fga_fast::attention_backward", "CUDA", attention_backward)
