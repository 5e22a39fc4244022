"""Feature score of every patch: how much of what an SAE finds present there is also influential.

    f = act(normalise(x) E + b),   h = g D^T,   s_t = sum_k f_tk h_tk        (design of FGA, mode "combined")

The native kernel walks the dictionary in tiles and uses s_t = g_t . (f_t D): per tile one encoder product, then either
a gather of the decoder rows of active features or, where many are active, a second product. Nothing of size P x F is
kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fga_fast.ops import _library
from fga_fast.precision import relevance_dtype

if TYPE_CHECKING:
    from fga_fast.sae import SparseAutoencoder

# The op takes numbers: in torch 2.11, every string that an op of the stable ABI is given leaks.
_ACTIVATIONS = ("relu", "topk", "topk_signed", "batch_topk", "jumprelu", "gated")
_NORMALIZE = (None, "layer_norm", "constant_norm")

MODES = ("combined", "activation_only", "gradient_only", "no_sae", "shuffled")


class Score(NamedTuple):
    """Scores and, where asked for, the strongest features behind them.

    Indices are int64, -1 where fewer than k features contribute; contributions are signed, in falling order of
    magnitude, ties to the lowest feature. Everything else is float64 for float64 x, else float32.
    """

    scores: Tensor  # [M, P]
    patch_index: Tensor  # [M, P, k]
    patch_contribution: Tensor  # [M, P, k]
    image_index: Tensor  # [M, k]
    image_contribution: Tensor  # [M, k], summed over the patches


def score(
    x: Tensor,  # [B, P, C]
    g: Tensor,  # [M, P, C]
    sae: SparseAutoencoder,
    mode: str = "combined",
    *,
    image: Tensor | None = None,  # [M]
    permutation: Tensor | None = None,  # [F]
    top_features: int = 0,
) -> Score:
    """Scores of the patches of M (image, target) pairs.

    Args:
        x: residual stream at the patches, any strides; codes are computed once an image.
        g: gradient of each pair's target with respect to x.
        sae: the dictionary; same device, dtype of x (or float32 for 16-bit x).
        mode: "combined" sum f h; "activation_only" sum f; "gradient_only" sum h; "no_sae" g . x; "shuffled" combined
            with decoder row k replaced by row permutation[k]. The last four are the controls of the method.
        image: int64, which image each row of g belongs to; by default row m is image m.
        permutation: int64, for "shuffled" only.
        top_features: k strongest features to report a patch and an image, at no second pass over the dictionary;
            for modes "combined", "activation_only" and "shuffled".

    Raises:
        ValueError: unknown mode, or arguments that do not belong to it.
        RuntimeError: shapes, dtypes or devices do not fit; the message names the argument.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if (permutation is None) == (mode == "shuffled"):
        raise ValueError(f'permutation: expected for mode "shuffled" and for no other, got mode {mode!r}')
    if mode in ("gradient_only", "no_sae"):
        if top_features:
            raise ValueError(f'top_features: mode {mode!r} has no feature contributions; use mode "combined"')
        return without_codes(x, g, sae, mode, image)
    _library.load()
    _library.require_kernel("score", x)
    return Score(
        *torch.ops.fga_fast.score(
            x, g, image, sae.W_enc.t(), sae.bias, sae.W_dec, sae.theta, sae.gate_scale, sae.mag_bias, permutation,
            *codes_of(sae.activation, sae.normalize, mode), sae.k or 0, top_features,
        )
    )  # fmt: skip


def codes_of(activation: str, normalize: str | None, mode: str) -> tuple[int, int, bool]:
    """What the op takes in place of these names."""
    return _ACTIVATIONS.index(activation), _NORMALIZE.index(normalize), mode != "activation_only"


def without_codes(x: Tensor, g: Tensor, sae: SparseAutoencoder, mode: str, image: Tensor | None) -> Score:
    """The two controls without codes: sum_k h_tk = g_t . (sum_k D_k), and g_t . x_t."""
    dtype = relevance_dtype(x.dtype)
    other = sae.dec_sum if mode == "gradient_only" else (x if image is None else x[image])
    scores = (g.to(dtype) * other.to(dtype)).sum(-1)
    rows, patches = scores.shape
    none, index = scores.new_empty(0), torch.empty(0, dtype=torch.int64, device=x.device)
    per_patch, per_image = (rows, patches, 0), (rows, 0)
    return Score(scores, index.view(per_patch), none.view(per_patch), index.view(per_image), none.view(per_image))


def _fake(
    x: Tensor, g: Tensor, image: Tensor | None, W_enc_t: Tensor, bias: Tensor, W_dec: Tensor, theta: Tensor | None,
    gate_scale: Tensor | None, mag_bias: Tensor | None, permutation: Tensor | None, activation: int, normalize: int,
    weigh: bool, k: int, top_features: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows, patches, _ = g.shape
    dtype = relevance_dtype(x.dtype)

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return x.new_empty(shape, dtype=of)

    per_patch, per_image = (rows, patches, top_features), (rows, top_features)
    index = torch.int64
    return (
        empty(rows, patches),
        empty(*per_patch, of=index),
        empty(*per_patch),
        empty(*per_image, of=index),
        empty(*per_image),
    )


def _vmap(
    info: Any, in_dims: tuple[int | None, ...], x: Tensor, g: Tensor, image: Tensor | None, *rest: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """One call for all K: the codes of images that every k shares are computed once."""
    if any(dim is not None for dim in in_dims[3:]):
        raise ValueError("score: vmap over a dictionary or a permutation is not possible; call score once for each")
    count, apart = info.batch_size, in_dims[0] is not None
    if apart:
        x = _library.fold(x, in_dims[0], count)
    images = len(x) // count if apart else len(x)
    image = _library.fold_image(image, in_dims[2], x, count, images, apart)
    outputs = torch.ops.fga_fast.score(x, _library.fold(g, in_dims[1], count), image, *rest)
    return tuple(_library.unfold(t, count) for t in outputs), (0,) * len(outputs)


def register() -> None:
    """Called once by the library's loader."""
    torch.library.register_fake("fga_fast::score", _fake)
    torch.library.register_vmap("fga_fast::score", _vmap)
    _library.refuse_gradient("score")
