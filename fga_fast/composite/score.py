"""Feature scores in PyTorch's operators, a chunk of patches at a time: one dense encoder product, and then, for codes
of few features, the decoder rows of these alone, else a second product.

Works on K targets at once (vmap): only the gradient is then batched, and codes are computed once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fga_fast.ops.score import WITHOUT_CODES, Score, check_mode, empty_score, without_codes
from fga_fast.precision import relevance_dtype
from fga_fast.sae import SparseAutoencoder
from fga_fast.sae.features import strongest

# Elements of one chunk's codes [rows, F]; with top features, contributions are as many for each target.
_CHUNK = 1 << 24


def score(
    x: Tensor,  # [B, P, C]
    g: Tensor,  # [B, P, C]
    sae: SparseAutoencoder,
    mode: str = "combined",
    *,
    permutation: Tensor | None = None,  # [F]
    top_features: int = 0,
) -> Score:
    """As `ops.score`, for one gradient an image.

    Raises:
        ValueError: unknown mode, or arguments that do not belong to it.
    """
    check_mode(mode, permutation, top_features)
    if mode in WITHOUT_CODES:
        return without_codes(x, g, sae, mode, None)
    batch, patches, _ = x.shape
    rows = max(1, _CHUNK // max(1, sae.d_sae * (1 + bool(top_features))))
    parts, found = [], []
    image_total: Tensor | float = 0.0
    dtype = relevance_dtype(x.dtype)
    W_dec = sae.W_dec if permutation is None else sae.W_dec[permutation]
    per_image = max(1, rows // max(1, batch))
    for first in range(0, patches, per_image):
        count = min(per_image, patches - first)
        codes = sae.encode(x[:, first : first + count].to(sae.dtype)).to(dtype)  # [B, rows, F]
        gradient = g.narrow(-2, first, count)
        if mode == "activation_only":
            contributions = codes if top_features else None
            parts.append(codes.sum(-1))
        elif top_features:
            contributions = codes * (gradient.to(W_dec.dtype) @ W_dec.t()).to(dtype)
            parts.append(contributions.sum(-1))
        else:
            contributions = None
            parts.append(((codes.to(W_dec.dtype) @ W_dec).to(dtype) * gradient.to(dtype)).sum(-1))
        if contributions is not None:
            found.append(strongest(contributions, top_features))
            image_total = image_total + contributions.sum(-2)
    scores = torch.cat(parts, -1) if parts else x.new_zeros(batch, patches, dtype=dtype)
    if not top_features or not found:
        return Score(scores, *empty_score(scores, scores.shape, 0)[1:])
    assert isinstance(image_total, Tensor)
    index, value = (torch.cat(piece, -2) for piece in zip(*found, strict=True))
    return Score(scores, index, value, *strongest(image_total, top_features))
