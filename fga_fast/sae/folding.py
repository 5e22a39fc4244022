"""Tensors derived from an SAE's raw parameters, so that kernels need one bias add and no centring.

With u = normalise(x) the encoder's pre-activation is ``(u - b_dec) W_enc + b_enc``. Every normalisation precedes the
subtraction, so it equals ``u W_enc + bias`` with ``bias = b_enc - b_dec W_enc`` exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of W_enc cast to float64 at a time: bounds the temporary to some tens of MB for d_model 1,024.
_ROWS = 4096


def folded_centring(
    W_enc_t: Tensor,  # [F, C]
    b_dec: Tensor,  # [C]
) -> Tensor:
    """``b_dec W_enc`` [F] in float64."""
    centre = b_dec.double()
    return torch.cat([rows.double() @ centre for rows in torch.split(W_enc_t, _ROWS)])


def decoder_sum(
    W_dec: Tensor,  # [F, C]
) -> Tensor:
    """Sum of the decoder rows [C] in float64 (the dense feature gradient's sum is ``g . decoder_sum``)."""
    total = torch.zeros(W_dec.shape[1], dtype=torch.float64, device=W_dec.device)
    for rows in torch.split(W_dec, _ROWS):
        total += rows.double().sum(dim=0)
    return total
