"""Tapped attention in PyTorch's operators: forward is its own scaled_dot_product_attention, backward goes in chunks of
query rows against all keys, so that the softmax of a chunk needs no statistics from the forward pass.

Every step is a plain operator, so K targets at once (vmap) need no rule of their own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of one chunk's map [B, H, rows, N], for each of the targets that are differentiated together: large enough
# for full speed, small beside a model's activations.
_CHUNK = 1 << 22


def attention(
    q: Tensor,  # [B, H, Nq, D]
    k: Tensor,  # [B, H, N, D]
    v: Tensor,  # [B, H, N, D]
    carrier: Tensor,  # [B, N]
    *,
    scale: float,
    bias: Tensor | None = None,  # broadcastable to [B, H, Nq, N]
    gated: bool = False,
    signed: bool = False,
    constant_map: bool = False,
) -> tuple[Tensor, None, Tensor, Tensor]:
    """As `ops.attention`, without the statistics, which nothing needs here: out, None, carrier [B, Nq], port [B, N].

    Raises:
        ValueError: a bias that requires a gradient, for which there is none.
        RuntimeError: shapes do not fit, in the words of PyTorch.
    """
    if bias is not None and bias.requires_grad:
        raise ValueError("attention: bias has no gradient here; detach it, or write the attention out with a softmax")
    settings = (scale, gated, signed, constant_map)
    out, carried, port = _Attention.apply(q, k, v, carrier, bias, *settings)  # type: ignore[no-untyped-call]
    return out, None, carried, port


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, carrier: Tensor, bias: Tensor | None, scale: float, gated: bool,
        signed: bool, constant_map: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(q, k, v, *([] if bias is None else [bias]))
        ctx.scale, ctx.gated, ctx.signed = scale, gated, signed
        ctx.need_qk, ctx.need_v = any(ctx.needs_input_grad[:2]) and not constant_map, ctx.needs_input_grad[2]
        ctx.dtype = carrier.dtype
        ctx.set_materialize_grads(False)
        mask = None if bias is None else bias.to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return out, carrier.new_zeros(len(q), q.shape[2]), carrier.new_zeros(len(q), k.shape[2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, *bias = ctx.saved_tensors
        grad_out, row, gate = grads
        if grad_out is None and row is None:  # a backward pass that ends above
            return (None,) * len(ctx.needs_input_grad)
        if ctx.gated and gate is None and row is not None:
            raise RuntimeError("attention: no gate arrived at the port of an attention called with gated=True")
        if grad_out is None:
            grad_out = q.new_zeros(*q.shape[:-1], v.shape[-1])
        if row is None:
            row = q.new_zeros(len(q), q.shape[2], dtype=ctx.dtype)
        rows = max(1, _CHUNK // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
        message: Tensor | float = 0.0
        dk: Tensor | float = 0.0
        dv: Tensor | float = 0.0
        dq = []
        for first in range(0, q.shape[2], rows):
            part = slice(first, first + rows)
            maps = _maps(q[:, :, part], k, [_rows_of(b, part, q.shape[2]) for b in bias], ctx.scale, ctx.dtype)
            go = grad_out.narrow(-2, first, min(rows, q.shape[2] - first))
            weighted = maps * (go @ v.transpose(-2, -1)).to(ctx.dtype)  # P * dP, [B, H, rows, N]
            seen = weighted if ctx.signed else weighted.clamp(min=0)
            arriving = row.narrow(-1, first, min(rows, q.shape[2] - first))
            message = message + (arriving.unsqueeze(-2) @ seen.mean(-3)).squeeze(-2)  # [B, N]
            if ctx.need_v:
                dv = dv + maps.to(v.dtype).transpose(-2, -1) @ go
            if ctx.need_qk:
                ds = ((weighted - maps * weighted.sum(-1, keepdim=True)) * ctx.scale).to(q.dtype)
                dq.append(ds @ k)
                dk = dk + ds.transpose(-2, -1) @ q[:, :, part]
        assert isinstance(message, Tensor)  # there is at least one query
        leaving = message if gate is None else gate * message
        none = (None,) * 5
        d_qk = (torch.cat(dq, dim=-2), dk) if ctx.need_qk else (None, None)
        return *d_qk, dv if ctx.need_v else None, leaving, *none


def _rows_of(bias: Tensor, part: slice, queries: int) -> Tensor:
    """The rows of a bias that belong to a chunk of queries; a bias of one row serves all."""
    return bias if bias.dim() < 2 or bias.shape[-2] != queries or queries == 1 else bias[..., part, :]


def _maps(q: Tensor, k: Tensor, bias: list[Tensor], scale: float, dtype: torch.dtype) -> Tensor:
    """Attention probabilities of some query rows [B, H, rows, N], in the dtype of relevance."""
    logits = (q @ k.transpose(-2, -1)).to(dtype) * scale
    for b in bias:
        logits = logits + b
    return logits.softmax(-1)
