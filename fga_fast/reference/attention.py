"""Softmax attention with its whole maps, their relevance, and the backward pass that carries a row of relevance.

Notation: A [B, H, Nq, N] attention probabilities, dA = dO V^T the gradient of the explained logit with respect to
them, Cbar = mean over heads of relu(A * dA). H. Chefer, S. Gur, L. Wolf: Transformer Interpretability Beyond Attention
Visualization, CVPR 2021, and Generic Attention-model Explainability, ICCV 2021.
"""

from __future__ import annotations

from torch import Tensor

from fga_fast.precision import relevance_dtype


def attention(
    q: Tensor,  # [B, H, Nq, D]
    k: Tensor,  # [B, H, N, D]
    v: Tensor,  # [B, H, N, Dv]
    scale: float,
    bias: Tensor | None = None,  # broadcastable to [B, H, Nq, N], added before the softmax
) -> tuple[Tensor, Tensor]:
    """Attention output and probabilities.

    Equation: `A = softmax(scale * q k^T + bias)`, `out = A v`.

    Returns:
        out [B, H, Nq, Dv] and A [B, H, Nq, N] with rows that sum to 1, both in the inputs' dtype.
    """
    logits = q @ k.transpose(-2, -1) * scale  # [B, H, Nq, N]
    if bias is not None:
        logits = logits + bias
    probabilities = logits.softmax(dim=-1)
    return probabilities @ v, probabilities


def attention_relevance(
    probabilities: Tensor,  # [M, H, Nq, N]
    gradient: Tensor,  # [M, H, Nq, N], of the explained logit with respect to the probabilities
    signed: bool = False,
) -> Tensor:
    """Relevance map of one attention, averaged over its heads.

    Equation: `Cbar = mean_h relu(A * dA)`, or `Cbar = mean_h (A * dA)` if `signed`, which keeps negative evidence.

    Returns:
        Cbar [M, Nq, N], values >= 0 unless signed, in `relevance_dtype`.
    """
    dtype = relevance_dtype(probabilities.dtype)
    weighted = probabilities.to(dtype) * gradient.to(dtype)
    return (weighted if signed else weighted.clamp(min=0)).mean(dim=1)


def attention_backward(
    grad_out: Tensor,  # [M, H, Nq, Dv]
    row: Tensor,  # [M, Nq]
    gate: Tensor | None,  # [M, N]; None: 1 everywhere
    q: Tensor,  # [B, H, Nq, D]
    k: Tensor,  # [B, H, N, D]
    v: Tensor,  # [B, H, N, Dv]
    image: Tensor | None,  # [M] int64, image of each row; None: M == B and row m belongs to image m
    scale: float,
    bias: Tensor | None = None,  # broadcastable to [B, H, Nq, N], added before the softmax
    signed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of softmax attention, and the row of relevance on its way from the output to the input tokens.

    Equations, with `A = softmax(scale * q k^T + bias)` and `dO = grad_out`:

        dv = A^T dO
        dA = dO v^T
        dS = A * (dA - rowsum(A * dA)),    dq = scale * dS k,    dk = scale * dS^T q
        Cbar = mean_h relu(A * dA), without the relu if signed
        row_out = gate * (row Cbar)

    `row + row_out` is `row (I + Cbar diag(gate))`, one factor of the rollout. At an attention pool, whose query is no
    token, row is [M, 1], usually 1, and row_out alone is the row over tokens.

    Returns:
        dq [M, H, Nq, D], dk [M, H, N, D], dv [M, H, N, Dv] in q's dtype, and row_out [M, N] in row's dtype.
    """
    if image is not None:
        q, k, v = q[image], k[image], v[image]
        if bias is not None and bias.dim() == 4 and bias.shape[0] > 1:
            bias = bias[image]
    _, probabilities = attention(q, k, v, scale, bias)  # [M, H, Nq, N]
    d_probabilities = grad_out @ v.transpose(-2, -1)  # [M, H, Nq, N]
    weighted = probabilities * d_probabilities
    d_logits = weighted - probabilities * weighted.sum(dim=-1, keepdim=True)
    dq = d_logits @ k * scale
    dk = d_logits.transpose(-2, -1) @ q * scale
    dv = probabilities.transpose(-2, -1) @ grad_out

    relevance = attention_relevance(probabilities, d_probabilities, signed).to(row.dtype)  # [M, Nq, N]
    message = (row.unsqueeze(1) @ relevance).squeeze(1)  # [M, N]
    return dq, dk, dv, message if gate is None else gate * message
