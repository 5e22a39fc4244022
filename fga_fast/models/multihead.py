"""`nn.MultiheadAttention` with its inside visible.

PyTorch's own `multi_head_attention_forward` is one call for a TorchFunctionMode: the attention inside it is hidden. The
mode answers that call with the function below and stays active meanwhile, so it sees the projections and the attention
inside.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fga_fast.models.block_io import TapeError


def open_multi_head_attention(
    query: Tensor,  # [Nq, B, C]
    key: Tensor,  # [N, B, Ck]
    value: Tensor,  # [N, B, Cv]
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,  # [3 C, C]
    in_proj_bias: Tensor | None,  # [3 C]
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,  # [C, C]
    out_proj_bias: Tensor | None,  # [C]
    training: bool = True,
    key_padding_mask: Tensor | None = None,  # [B, N]
    need_weights: bool = True,
    attn_mask: Tensor | None = None,  # [Nq, N] or [B H, Nq, N]
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,  # [C, C]
    k_proj_weight: Tensor | None = None,  # [C, Ck]
    v_proj_weight: Tensor | None = None,  # [C, Cv]
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`torch.nn.functional.multi_head_attention_forward`, argument by argument, for the cases that can be explained.

    Returns:
        out [Nq, B, C], and the attention probabilities (without gradient) where `need_weights` asks for them:
        [B, Nq, N], or [B, H, Nq, N] unless averaged over heads.
    """
    if bias_k is not None or bias_v is not None or add_zero_attn or static_k is not None or static_v is not None:
        raise TapeError(
            "model: its nn.MultiheadAttention has keys that belong to no token (add_bias_kv, add_zero_attn or static "
            "keys), so its attention maps cannot be rolled out"
        )
    if query.dim() != 3:
        raise TapeError(f"model: nn.MultiheadAttention is called without a batch, with a query {tuple(query.shape)}")
    separate = (q_proj_weight, k_proj_weight, v_proj_weight)
    q, k, v = _project(query, key, value, None if use_separate_proj_weight else in_proj_weight, separate, in_proj_bias)
    batch, queries, width = q.shape
    q, k, v = (t.view(batch, t.shape[1], num_heads, width // num_heads).transpose(1, 2) for t in (q, k, v))
    mask = _mask(attn_mask, key_padding_mask, num_heads, q)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout_p if training else 0.0, is_causal=is_causal and mask is None
    )
    weights_out = _probabilities(q, k, mask, average_attn_weights) if need_weights else None
    out = F.linear(out.transpose(1, 2).reshape(batch, queries, width), out_proj_weight, out_proj_bias)
    return out.transpose(0, 1), weights_out


def _project(
    query: Tensor,  # [Nq, B, C]
    key: Tensor,  # [N, B, Ck]
    value: Tensor,  # [N, B, Cv]
    packed: Tensor | None,  # [3 C, C]; None: the three are separate
    separate: tuple[Any, Any, Any],  # [C, C], [C, Ck], [C, Cv]; None beside packed ones
    bias: Tensor | None,  # [3 C]
) -> list[Tensor]:
    """q [B, Nq, C], k and v [B, N, C]."""
    if packed is not None and query is key and key is value:
        return [*F.linear(query.transpose(0, 1), packed, bias).chunk(3, dim=-1)]  # one product for all three
    weights = separate if packed is None else packed.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    parts = zip((query, key, value), weights, biases, strict=True)
    return [F.linear(x.transpose(0, 1), weight, b) for x, weight, b in parts]


def _mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, heads: int, like: Tensor) -> Tensor | None:
    """The two masks as one in the dtype of `like` that is added and broadcasts to [B, H, Nq, N]."""
    masks = []
    for mask in (attn_mask, None if key_padding_mask is None else key_padding_mask[:, None, None, :]):
        if mask is None:
            continue
        if mask.dtype == torch.bool:  # True: not attended to
            mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
        masks.append(mask.view(-1, heads, *mask.shape[1:]) if mask.dim() == 3 else mask)
    return sum(masks[1:], masks[0]) if masks else None


@torch.no_grad()
def _probabilities(
    q: Tensor,  # [B, H, Nq, D]
    k: Tensor,  # [B, H, N, D]
    mask: Tensor | None,
    average: bool,
) -> Tensor:
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    # Written out, since a softmax is what a mode takes for the attention of models that compute it themselves.
    logits = logits if mask is None else logits + mask
    shifted = (logits - logits.amax(-1, keepdim=True)).exp()
    maps: Tensor = shifted / shifted.sum(-1, keepdim=True)
    return maps.mean(dim=1) if average else maps
