"""Feature score of every patch: how much of what an SAE finds present there is also influential.

    f = act(normalise(x) E + b),   h = g D^T,   s_t = sum_k f_tk h_tk        (design of FGA, mode "combined")

The native kernel walks the dictionary in tiles and uses s_t = g_t . (f_t D): per tile one encoder product, then either
a gather of the decoder rows of active features or, where many are active, a second product. Nothing of size P x F is
kept.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
from torch import Tensor

from fga_fast.ops import library
from fga_fast.ops.round_encoder import round_encoder
from fga_fast.precision import relevance_dtype
from fga_fast.settings import Activation, Mode, Normalisation

if TYPE_CHECKING:
    from fga_fast.sae import SparseAutoencoder

_rounding = threading.Lock()  # so that threads that share an SAE round it once

MODES = get_args(Mode)
WITHOUT_CODES = ("gradient_only", "no_sae")


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
    check_mode(mode, permutation, top_features)
    if mode in WITHOUT_CODES:
        return without_codes(x, g, sae, mode, image)
    library.load()
    library.require_kernel("score", x)
    return Score(
        *torch.ops.fga_fast.score(
            x, g, image, sae.W_enc.t(), sae.bias, sae.W_dec, sae.theta, sae.gate_scale, sae.mag_bias, permutation,
            *_rounded(sae), *codes_of(sae.activation, sae.normalize, mode), sae.k or 0, top_features,
        )
    )  # fmt: skip


def _rounded(sae: SparseAutoencoder) -> tuple[Tensor | None, Tensor | None]:
    """The encoder in 16-bit integers, by which the kernel skips features that are off for certain; kept with the SAE.

    It is made again when somebody has written into the encoder, since bounds of another one would lose features. Torch
    counts what is written, except through `.data`, NumPy or DLPack.
    """
    weights = sae.W_enc.t()
    if sae.dtype != torch.float32 or sae.device.type != "cpu" or weights.is_inference():
        return None, None
    version = weights._version, os.environ.get("FGA_FAST_BOUND")
    with _rounding:
        if sae.encoder_version != version:
            with torch.inference_mode(False):
                found = round_encoder(weights, only_if_used=True)
            sae.encoder, sae.limits = found if found.encoder.numel() else (None, None)
            sae.encoder_version = version
        encoder, limits = sae.encoder, sae.limits
    return (None, None) if limits is None else (encoder, limits)


def check_mode(mode: str, permutation: Tensor | None, top_features: int) -> None:
    """Checks the arguments that all implementations of the score share.

    Raises:
        ValueError: unknown mode, or arguments that do not belong to it.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if (permutation is None) == (mode == "shuffled"):
        raise ValueError(f'permutation: expected for mode "shuffled" and for no other, got mode {mode!r}')
    if top_features and mode in WITHOUT_CODES:
        raise ValueError(
            f'top_features: mode {mode!r} has no feature contributions, got {top_features}; use mode "combined"'
        )


def codes_of(activation: str, normalize: str | None, mode: str) -> tuple[int, int, bool]:
    """The numbers that the op takes in place of these names; csrc/cpu/score.h names them in the same order."""
    normalisations = (None, *get_args(Normalisation))
    return get_args(Activation).index(activation), normalisations.index(normalize), mode != "activation_only"


def without_codes(x: Tensor, g: Tensor, sae: SparseAutoencoder, mode: str, image: Tensor | None) -> Score:
    """The two controls without codes: sum_k h_tk = g_t . (sum_k D_k), and g_t . x_t."""
    dtype = relevance_dtype(x.dtype)
    other = sae.dec_sum if mode == "gradient_only" else (x if image is None else x[image])
    scores = (g.to(dtype) * other.to(dtype)).sum(-1)
    return Score(scores, *empty_score(scores, scores.shape, 0)[1:])


def empty_score(like: Tensor, shape: Sequence[int], k: int) -> Score:
    """A score of that shape, [M, P], with k features a patch and an image, whose values are not set.

    Args:
        like: a tensor on the result's device; its dtype decides the result's, as that of x does.
    """
    dtype, per_patch, per_image = relevance_dtype(like.dtype), (*shape, k), (shape[0], k)
    return Score(
        like.new_empty(shape, dtype=dtype),
        like.new_empty(per_patch, dtype=torch.int64),
        like.new_empty(per_patch, dtype=dtype),
        like.new_empty(per_image, dtype=torch.int64),
        like.new_empty(per_image, dtype=dtype),
    )


def register_score_rules(op: str) -> None:
    """Registers shapes, vmap rule and autograd formula of `fga_fast::<op>`: the native score's, or Triton's.

    Both begin with x, g and image and end with top_features.
    """

    def fake(x: Tensor, g: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return tuple(empty_score(x, g.shape[:2], rest[-1]))

    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, g: Tensor, image: Tensor | None, *rest: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """One call for all K: the codes of images that every k shares are computed once."""
        if any(dim is not None for dim in in_dims[3:]):
            raise ValueError("score: vmap over a dictionary or a permutation is not possible; call score once for each")
        count, apart = info.batch_size, in_dims[0] is not None
        if apart:
            x = library.fold(x, in_dims[0], count)
        images = len(x) // count if apart else len(x)
        image = library.fold_image(image, in_dims[2], x, count, images, apart)
        outputs = getattr(torch.ops.fga_fast, op)(x, library.fold(g, in_dims[1], count), image, *rest)
        return tuple(library.unfold(t, count) for t in outputs), (0,) * len(outputs)

    library.register_rules(op, fake, vmap)


@library.at_load
def _register() -> None:
    register_score_rules("score")
