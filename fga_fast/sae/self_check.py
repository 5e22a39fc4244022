"""How well an SAE fits the activations it is used on: a wrong block, model or normalisation shows at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Tokens encoded at a time: codes of 49,152 float32 features take 50 MB.
_ROWS = 256


class SelfCheck(NamedTuple):
    """What `SparseAutoencoder.self_check` found; compare it with the numbers the SAE was published with."""

    explained_variance: float  # share of the tokens' variance that is reconstructed, at most 1
    l0: float  # mean number of active features a token, 0 to F
    dead: float  # share of the features that no token activated, 0 to 1
    tokens: int  # number of tokens looked at


@torch.no_grad()
def self_check(
    encode: Callable[[Tensor], Tensor],  # [T, C] -> [T, F]
    decode: Callable[[Tensor, Tensor], Tensor],  # [T, F], [T, C] -> [T, C]
    x: Tensor,  # [..., C]
    d_sae: int,
) -> SelfCheck:
    """Encode and reconstruct the tokens once; see `SparseAutoencoder.self_check`."""
    rows = x.reshape(-1, x.shape[-1])
    total = ((rows.double() - rows.double().mean(dim=0)) ** 2).sum() if len(rows) > 1 else rows.new_zeros(())
    if float(total) == 0.0:
        raise ValueError(f"x: expected at least two tokens that differ, got shape {list(x.shape)} without variance")
    fired = torch.zeros(d_sae, dtype=torch.bool, device=rows.device)
    residual, active = 0.0, 0
    for part in torch.split(rows, _ROWS):
        codes = encode(part)  # [rows, F]
        on = codes != 0  # signed codes count too
        fired |= on.any(dim=0)
        active += int(on.sum())
        residual += float(((part.double() - decode(codes, part).double()) ** 2).sum())
    dead = 1.0 - int(fired.sum()) / d_sae
    return SelfCheck(1.0 - residual / float(total), active / len(rows), dead, len(rows))
