"""How well an SAE fits the activations it is used on: a wrong layer, model or normalisation shows at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fga_fast.sae.checks import check_activations

if TYPE_CHECKING:
    from fga_fast.sae.sparse_autoencoder import SparseAutoencoder

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
    sae: SparseAutoencoder,
    x: Tensor,  # [..., C]
) -> SelfCheck:
    """Encode and reconstruct the tokens once; see `SparseAutoencoder.self_check`.

    Raises:
        TypeError, ValueError: as `SparseAutoencoder.encode`; fewer than two tokens or no variance.
    """
    rows = check_activations("x", x, sae.d_model, sae.W_dec).reshape(-1, sae.d_model)
    total = ((rows.double() - rows.double().mean(dim=0)) ** 2).sum() if len(rows) > 1 else torch.zeros(())
    if float(total) == 0.0:
        raise ValueError(f"x: expected at least two tokens that differ, got shape {list(x.shape)} without variance")
    fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=rows.device)
    residual, active = 0.0, 0
    for part in torch.split(rows, _ROWS):
        codes = sae.encode(part)  # [rows, F]
        on = codes != 0  # signed codes count too
        fired |= on.any(dim=0)
        active += int(on.sum())
        residual += float(((part.double() - sae.decode(codes, part).double()) ** 2).sum())
    dead = 1.0 - int(fired.sum()) / sae.d_sae
    return SelfCheck(1.0 - residual / float(total), active / len(rows), dead, len(rows))


@torch.no_grad()
def l0(
    sae: SparseAutoencoder,
    x: Tensor,  # [..., C]
) -> float:
    """Mean number of active features a token; see `SparseAutoencoder.l0`."""
    rows = check_activations("x", x, sae.d_model, sae.W_dec).reshape(-1, sae.d_model)
    if len(rows) == 0:
        raise ValueError(f"x: expected at least one token, got shape {list(x.shape)}")
    return sum(int((sae.encode(part) != 0).sum()) for part in torch.split(rows, _ROWS)) / len(rows)
