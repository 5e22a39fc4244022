"""An SAE's encoder in 16-bit integers, by which the native score skips features that are off for certain.

csrc/cpu/bound.h has the inequality behind it. It is made once for each SAE, and is half as large as the encoder.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fga_fast.ops import library


class RoundedEncoder(NamedTuple):
    """Row f of the encoder is limits[0, f] times its integers, plus an error whose length is at most limits[2, f]."""

    encoder: Tensor  # [F / 16, C / 2, 16, 2] int16: two numbers of 16 features side by side; F padded to 32s
    limits: Tensor  # [3, F] float32: scale, length of the row, length of the error (inf: the row is not bounded)


def round_encoder(
    W_enc_t: Tensor,  # [F, C]
    only_if_used: bool = False,
) -> RoundedEncoder:
    """Rounds each row with a scale of its own.

    Args:
        W_enc_t: float32, on the CPU, at most 65,536 wide.
        only_if_used: give empty tensors where the score would not use them: on this processor, or for this width.

    Raises:
        RuntimeError: another shape, dtype or device.
    """
    library.load()
    return RoundedEncoder(*torch.ops.fga_fast.round_encoder(W_enc_t, only_if_used))
