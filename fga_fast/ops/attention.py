"""Tapped attention: scaled dot-product attention through whose backward pass relevance travels.

Forward it is ordinary attention with one more input, the carrier, and two more outputs, the carrier for the next block
and the gate port; all three hold zeros. Backward, the *gradient* of the carrier is the relevance row v of TransMM
(Chefer, Gur and Wolf 2021) and the gradient of the port the gate w:

    Cbar = mean_h relu(dA * A),    v <- v + w * (v Cbar)

so one call of `torch.autograd.grad` explains the whole model, and no [N, N] map is ever kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fga_fast.ops import _library


def attention(
    q: Tensor,  # [B, H, Nq, D]
    k: Tensor,  # [B, H, N, D]
    v: Tensor,  # [B, H, N, D]
    carrier: Tensor,  # [B, N]
    *,
    scale: float,
    gated: bool = False,
    residual: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention whose backward pass also moves relevance from queries to keys.

    Args:
        q, k, v: float32, float64, bfloat16 or float16, any strides.
        carrier: float64 for float64 q, else float32.
        scale: factor on q k^T, usually D ** -0.5.
        gated: a gate arrives at the port in backward; without it the gate is 1.
        residual: the block adds its attention to its input, so relevance also stays where it was (Nq = N). False for
            a pooling head, whose own row starts the rollout.

    Returns:
        out [B, H, Nq, D] in q's dtype over token-major memory; lse [B, H, Nq], the softmax statistics, without
        gradient; carrier [B, Nq]; port [B, N]. The last two are zeros, see above.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; the message names the argument.
    """
    _library.load()
    _library.require_cpu("attention", q)
    out, lse, carried, port = torch.ops.fga_fast.attention(q, k, v, carrier, scale, gated, residual)
    return out, lse, carried, port


def attention_backward(
    grad_out: Tensor,  # [M, H, Nq, D]
    row: Tensor,  # [M, Nq]
    gate: Tensor | None,  # [M, N]
    q: Tensor,  # [B, H, Nq, D]
    k: Tensor,  # [B, H, N, D]
    v: Tensor,  # [B, H, N, D]
    out: Tensor,  # [B, H, Nq, D]
    lse: Tensor,  # [B, H, Nq]
    *,
    scale: float,
    image: Tensor | None = None,  # [M]
    residual: bool = True,
    need_qkv: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of the rollout together with the gradients of attention, for M (image, target) pairs.

    Several targets of an image share its q, k, v, out and lse: row m belongs to image `image[m]` (int64), by default
    to image m. Probabilities are rebuilt tile by tile from `lse`; memory is linear in N.

    Returns:
        dq [M, H, Nq, D], dk and dv [M, H, N, D] (each [0] unless `need_qkv`), and the relevance that leaves,
        [M, N]: (row if residual) + gate * (row Cbar), in float64 for float64 models, else float32.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; the message names the argument.
    """
    _library.load()
    _library.require_cpu("attention_backward", q)
    dq, dk, dv, row_out = torch.ops.fga_fast.attention_backward(
        grad_out, row, gate, q, k, v, out, lse, image, scale, residual, need_qkv
    )
    return dq, dk, dv, row_out


def _token_major(like: Tensor, shape: tuple[Any, ...]) -> Tensor:
    images, heads, tokens, width = shape
    return like.new_empty(images, tokens, heads, width).transpose(1, 2)


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, carrier: Tensor, scale: float, gated: bool, residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, heads, queries, width = q.shape
    lse = q.new_empty(images, heads, queries, dtype=_library.statistic_dtype(q.dtype))
    carried, port = carrier.new_empty(images, queries), carrier.new_empty(images, k.shape[2])
    return _token_major(q, (images, heads, queries, width)), lse, carried, port


def _attention_backward_fake(
    grad_out: Tensor, row: Tensor, gate: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    image: Tensor | None, scale: float, residual: bool, need_qkv: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows, heads, queries, width = grad_out.shape
    keys = k.shape[2]
    row_out = row.new_empty(rows, keys)
    if not need_qkv:
        return q.new_empty(0), q.new_empty(0), q.new_empty(0), row_out
    to_keys = (rows, heads, keys, width)
    return _token_major(q, (rows, heads, queries, width)), _token_major(q, to_keys), _token_major(q, to_keys), row_out


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, carrier, ctx.scale, ctx.gated, ctx.residual = inputs
    ctx.save_for_backward(q, k, v, output[0], output[1])
    ctx.carrier_dtype = carrier.dtype
    ctx.mark_non_differentiable(output[1])
    # Zeros in place of what does not arrive would be read as a gate of zero.
    ctx.set_materialize_grads(False)


def _attention_grad(
    ctx: Any, grad_out: Tensor | None, _grad_lse: Tensor | None, row: Tensor | None, gate: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    if ctx.gated and gate is None:
        raise RuntimeError("attention: no gate arrived at the port of an attention called with gated=True")
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    if row is None:
        row = out.new_zeros(q.shape[0], q.shape[2], dtype=ctx.carrier_dtype)
    need_qkv = any(ctx.needs_input_grad[:3])
    dq, dk, dv, row_out = torch.ops.fga_fast.attention_backward(
        grad_out, row, gate if ctx.gated else None, q, k, v, out, lse, None, ctx.scale, ctx.residual, need_qkv
    )
    if not need_qkv:
        return None, None, None, row_out, None, None, None
    return dq, dk, dv, row_out, None, None, None


def register() -> None:
    """Called once by the library's loader."""
    torch.library.register_fake("fga_fast::attention", _attention_fake)
    torch.library.register_fake("fga_fast::attention_backward", _attention_backward_fake)
    torch.library.register_autograd("fga_fast::attention", _attention_grad, setup_context=_save)
    _library.refuse_gradient("attention_backward")
