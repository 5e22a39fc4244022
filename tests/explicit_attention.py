"""Attention written out as a softmax, its gradients by autograd and its rollout by matrix products: what the op tests
compare to, shared with nothing in the package."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    out: Tensor  # [B, H, Nq, D]
    dq: Tensor  # [M, H, Nq, D]
    dk: Tensor  # [M, H, N, D]
    dv: Tensor  # [M, H, N, D]
    row: Tensor  # [M, N]


class Problem(NamedTuple):
    q: Tensor  # [B, H, Nq, D]
    k: Tensor  # [B, H, N, D]
    v: Tensor  # [B, H, N, D]
    grad_out: Tensor  # [M, H, Nq, D]
    row: Tensor  # [M, Nq]
    gate: Tensor  # [M, N]

    @property
    def carrier(self) -> Tensor:
        return self.gate.new_zeros(self.k.shape[0], self.k.shape[2])


def problem(
    images: int = 2, heads: int = 3, queries: int = 7, keys: int = 9, width: int = 5, rows: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Problem:  # fmt: skip
    rows = images if rows is None else rows
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Problem(
        torch.randn(images, queries, heads, width).to(dtype).transpose(1, 2),
        torch.randn(images, keys, heads, width).to(dtype).transpose(1, 2),
        torch.randn(images, keys, heads, width).to(dtype).transpose(1, 2),
        torch.randn(rows, queries, heads, width).to(dtype).transpose(1, 2),
        torch.rand(rows, queries, dtype=wide), torch.rand(rows, keys, dtype=wide) * 3,
    )  # fmt: skip


def explicit(
    p: Problem, scale: float, bias: Tensor | None = None, *, image: Tensor | None = None, signed: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Step:  # fmt: skip
    """Forward pass and one step backward in `dtype`, bias [B or 1, H or 1, Nq or 1, N or 1]."""
    q, k, v, grad_out = (t.to(dtype) for t in p[:4])
    bias = None if bias is None else bias.to(dtype).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if image is not None:
        q, k, v = q[image], k[image], v[image]
        bias = None if bias is None else bias[image]
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    logits = q @ k.transpose(-2, -1) * scale
    attention = (logits if bias is None else logits + bias).softmax(-1)
    out = attention @ v
    dq, dk, dv, gradient = torch.autograd.grad(out, [q, k, v, attention], grad_out)
    weighted = (attention * gradient).detach()
    cbar = (weighted if signed else weighted.relu()).mean(1).to(p.row.dtype)
    return Step(out.detach(), dq, dk, dv, p.gate * (p.row.unsqueeze(1) @ cbar).squeeze(1))


def relative(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of `want`; NaN or Inf and another shape fail."""
    assert got.shape == want.shape
    assert torch.isfinite(got).all(), "NaN or Inf"
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-6))
