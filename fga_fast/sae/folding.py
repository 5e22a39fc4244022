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


def derived_tensors(
    W_enc_t: Tensor,  # [F, C]
    W_dec: Tensor,  # [F, C]
    b_dec: Tensor,  # [C]
    b_enc: Tensor | None,  # [F]
    threshold: Tensor | None,  # [] or [F]
    b_gate: Tensor | None,  # [F]
    r_mag: Tensor | None,  # [F]
    b_mag: Tensor | None,  # [F]
) -> dict[str, Tensor]:
    """The tensors kernels read beside the weights: see the attributes of `SparseAutoencoder`. Float64, but theta."""
    centring = folded_centring(W_enc_t, b_dec)  # [F]
    # The sum of the dense feature gradient is ``g . dec_sum``.
    totals = (rows.double().sum(dim=0) for rows in torch.split(W_dec, _ROWS))
    derived = {"dec_sum": sum(totals, start=centring.new_zeros(()))}
    if b_gate is not None and r_mag is not None and b_mag is not None:
        scale = r_mag.double().exp()
        derived |= {
            "bias": b_gate.double() - centring,
            "gate_scale": scale,
            "mag_bias": b_mag.double() - scale * centring,
        }
    else:
        derived["bias"] = -centring if b_enc is None else b_enc.double() - centring
    if threshold is not None:
        derived["theta"] = threshold.expand(len(W_enc_t))
    return derived
