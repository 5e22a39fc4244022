"""How much a patch's features speak for the explained logit: codes times feature gradients, densely.

Notation: x [B, P, C] residual stream after a block at the patches, g [M, P, C] the gradient of the explained logit with
respect to it, f [., P, F] the codes of a sparse autoencoder, D [F, C] its decoder rows.
"""

from __future__ import annotations

from torch import Tensor

from fga_fast.precision import relevance_dtype
from fga_fast.sae.features import TopFeatures, strongest
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder


def contributions(
    x: Tensor,  # [B, P, C]
    g: Tensor,  # [M, P, C]
    sae: SparseAutoencoder,
    mode: str = "combined",
    *,
    image: Tensor | None = None,  # [M] int64, image of each row; None: M == B
    permutation: Tensor | None = None,  # [F] int64, only for "shuffled"
) -> Tensor:
    """Contribution of every feature to the score of every patch.

    Equations: `f = act(normalise(x) E + b)` (sae.encode), `h = g D^T` with the raw gradient g, and

        combined:         c_k = f_k h_k
        activation_only:  c_k = f_k
        gradient_only:    c_k = h_k
        shuffled:         c_k = f_k h_{permutation(k)}, that is decoder row k replaced by row permutation(k)

    Returns:
        [M, P, F] in `relevance_dtype`.

    Raises:
        ValueError: an unknown mode, "no_sae" (which has no features), or "shuffled" without a permutation.
    """
    dtype = relevance_dtype(x.dtype)
    codes = sae.encode(x.to(sae.W_dec.dtype)).to(dtype)  # [B, P, F]
    if image is not None:
        codes = codes[image]  # [M, P, F]
    if mode == "activation_only":
        return codes
    decoder = sae.W_dec
    if mode == "shuffled":
        if permutation is None:
            raise ValueError(
                "permutation: expected a permutation [F] of the decoder rows for mode 'shuffled', got None"
            )
        decoder = decoder[permutation]
    gradients = (g.to(decoder.dtype) @ decoder.t()).to(dtype)  # [M, P, F]
    if mode == "gradient_only":
        return gradients
    if mode in ("combined", "shuffled"):
        return codes * gradients
    raise ValueError(
        f"mode: expected 'combined', 'activation_only', 'gradient_only' or 'shuffled' for feature contributions, got "
        f"{mode!r}"
    )


def score(
    x: Tensor,  # [B, P, C]
    g: Tensor,  # [M, P, C]
    sae: SparseAutoencoder | None,
    mode: str,
    *,
    image: Tensor | None = None,  # [M] int64, image of each row; None: M == B
    permutation: Tensor | None = None,  # [F] int64, only for "shuffled"
) -> Tensor:
    """Score of every patch.

    Equations: `s = sum_k c_k` with the `contributions` of the mode, or `s = g . x` for "no_sae", which needs no
    autoencoder.

    Returns:
        s [M, P] in `relevance_dtype`.

    Raises:
        ValueError: an unknown mode, "shuffled" without a permutation, or no autoencoder where one is needed.
    """
    if mode == "no_sae":
        dtype = relevance_dtype(x.dtype)
        residual = x if image is None else x[image]
        return (g.to(dtype) * residual.to(dtype)).sum(dim=-1)
    if sae is None:
        raise ValueError(f"sae: expected a SparseAutoencoder for mode {mode!r}, got None")
    return contributions(x, g, sae, mode, image=image, permutation=permutation).sum(dim=-1)


def top_features(
    contribution: Tensor,  # [M, P, F]
    k: int,
) -> TopFeatures:
    """The k features with the largest absolute contribution, per patch and per image (summed over its patches).

    Equal strength is ordered by the lower feature index; the index is -1 where fewer than k features contribute.

    Returns:
        `TopFeatures`, contributions with their sign and in the dtype of `contribution`.

    Raises:
        ValueError: k is not in [1, F].
    """
    if not 1 <= k <= contribution.shape[-1]:
        raise ValueError(f"k: expected 1 to {contribution.shape[-1]} (the number of features), got {k}")
    of_image = contribution.sum(dim=1)  # [M, F]
    return TopFeatures(*strongest(contribution, k), *strongest(of_image, k))
