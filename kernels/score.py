"""Score: how much of what an SAE finds present at a patch is also influential. Has never run on a device.

Registers the operator `fga_fast::triton_score`, brings its arguments into the form the kernels want, and takes the
dense route (score_dense.py) or the sparse one (score_topk.py). The equations are those of fga_fast/reference/score.py.
No result is read back by the host, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from fga_fast.ops.score import WITHOUT_CODES, Score, check_mode, empty_score, register_score_rules, without_codes

from . import tiling
from .device import INTERPRETED, check_device, device_name, on
from .score_dense import Problem, dense
from .score_topk import sparse

if TYPE_CHECKING:
    from fga_fast.sae import SparseAutoencoder

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_KINDS = {"topk": "select", "topk_signed": "select", "jumprelu": "threshold", "batch_topk": "threshold"}


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
    """As `ops.score`, on a CUDA device. float32, float16 and bfloat16; sums and scores are float32.

    float32 products are plain float32 unless torch was told that TensorFloat32 is precise enough
    (`torch.set_float32_matmul_precision("high")`). Indices outside their range fail a device-side assertion.

    Raises:
        ValueError: unknown mode, or arguments that do not belong to it.
        RuntimeError: shapes, dtypes (float64 among them) or devices do not fit; the message names the argument.
    """
    check_mode(mode, permutation, top_features)
    if mode in WITHOUT_CODES:
        return without_codes(x, g, sae, mode, image)
    check_device("score", x)
    return Score(
        *torch.ops.fga_fast.triton_score(
            x, g, image, sae.W_enc.t(), sae.bias, sae.W_dec, sae.theta, sae.gate_scale, sae.mag_bias, permutation,
            sae.activation, sae.normalize or "", "activation_only" if mode == "activation_only" else "combined",
            _density(sae), sae.k or 0, top_features,
        )
    )  # fmt: skip


def _density(sae: SparseAutoencoder) -> float | None:
    """Share of the dictionary that is active in a token; None: unknown."""
    return None if sae.expected_l0 is None else sae.expected_l0 / sae.d_sae


@triton.jit(do_not_specialize=["P"])
def _normalise(x, to, P, C, x_image, x_patch, EPSILON: tl.constexpr, CENTRE: tl.constexpr, BLOCK: tl.constexpr):
    """One token to (x - mean) / (unbiased std + epsilon), or to norm sqrt(C); a zero token stays zero."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < C
    at = x + token // P * x_image + token % P * x_patch + column
    row = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if CENTRE:
        row = tl.where(inside, row - tl.sum(row, axis=0) / C, 0.0)
        row = row / (tl.sqrt(tl.sum(row * row, axis=0) / (C - 1)) + EPSILON)
    else:
        norm = tl.sqrt(tl.sum(row * row, axis=0) / C)
        row = row / tl.where(norm == 0, 1.0, norm)
    tl.store(to + token * C + column, row, mask=inside)


def _aligned(tensor: Tensor) -> Tensor:  # [., P, C]
    """The tensor itself if its rows can be read 16 bytes at a time, also without its prefix tokens; else a copy."""
    image, patch, column = tensor.stride()
    offset = tensor.storage_offset() * tensor.element_size()
    return tensor if column == 1 and not (image % 16 or patch % 16 or offset % 16) else tensor.contiguous()


def _normalised(x: Tensor, kind: str, dtype: torch.dtype) -> Tensor:  # [B, P, C]
    """Normalised tokens in the encoder's dtype, rows contiguous. Statistics are float32."""
    x = _aligned(x)
    if not kind:
        return x.to(dtype)
    to = torch.empty(x.shape, dtype=dtype, device=x.device)
    images, patches, width = x.shape
    with on(x):
        _normalise[(images * patches,)](
            x, to, patches, width, x.stride(0), x.stride(1), EPSILON=1e-5, CENTRE=kind == "layer_norm",
            BLOCK=triton.next_power_of_2(width),
        )  # fmt: skip
    return to


def _check(
    x: Tensor, g: Tensor, image: Tensor | None, W_enc_t: Tensor, W_dec: Tensor, permutation: Tensor | None,
    top_features: int,
) -> None:  # fmt: skip
    def shape(name: str, tensor: Tensor, *want: int) -> None:
        if list(tensor.shape) != list(want):
            raise RuntimeError(f"score: {name} must have shape {list(want)}, got {list(tensor.shape)}")

    if x.ndim != 3 or g.ndim != 3:
        raise RuntimeError(f"score: x and g must be [B, P, C] and [M, P, C], got {list(x.shape)} and {list(g.shape)}")
    features, width = W_enc_t.shape
    shape("x", x, len(x), x.shape[1], width)
    shape("W_dec", W_dec, features, width)
    rows = len(x) if image is None else len(image)
    shape("g", g, rows, x.shape[1], width)
    for name, tensor in (("x", x), ("the dictionary", W_enc_t)):
        if tensor.dtype not in DTYPES:
            raise RuntimeError(
                f"score: {name} must be float32, float16 or bfloat16 in Triton kernels, got "
                f'{str(tensor.dtype).removeprefix("torch.")}; use backend="composite" for float64'
            )
    if W_enc_t.dtype not in (x.dtype, torch.float32):
        raise RuntimeError(f"score: the dictionary must be {x.dtype} like x, or float32, got {W_enc_t.dtype}")
    for name, index, count in (("image", image, len(x)), ("permutation", permutation, features)):
        if index is None:
            continue
        if index.ndim != 1 or index.dtype != torch.int64:
            raise RuntimeError(f"score: {name} must be int64 with one dim, got {index.dtype} {list(index.shape)}")
        torch._assert_async(
            ((index >= 0) & (index < count)).all(), f"score: {name} must be within 0 to {count - 1} everywhere"
        )
    if permutation is not None:
        shape("permutation", permutation, features)
    for name, other in (("g", g), ("the dictionary", W_enc_t), ("image", image), ("permutation", permutation)):
        if other is not None and other.device != x.device:
            raise RuntimeError(f"score: {name} must be on {x.device} like x, got {other.device}")
    if not 0 <= top_features <= features:
        raise RuntimeError(f"score: top_features must be 0 to {features} (the features), got {top_features}")


def _problem(
    x: Tensor, g: Tensor, image: Tensor | None, W_enc_t: Tensor, bias: Tensor, W_dec: Tensor, theta: Tensor | None,
    gate_scale: Tensor | None, mag_bias: Tensor | None, permutation: Tensor | None, activation: str, normalize: str,
    mode: str,
) -> Problem:  # fmt: skip
    dtype = W_enc_t.dtype
    start = order = gradient = None
    if mode == "combined":
        gradient = _aligned(g.to(dtype))
        if image is not None:
            ordered, order = image.sort(stable=True)
            start = torch.searchsorted(ordered, torch.arange(len(x) + 1, device=x.device))
    return Problem(
        _normalised(x, normalize, dtype), gradient, start, order, W_enc_t.contiguous(), bias, W_dec.contiguous(),
        theta, gate_scale, mag_bias, None if permutation is None else permutation.contiguous(),
        _KINDS.get(activation, activation),
    )  # fmt: skip


def _run(
    x: Tensor, g: Tensor, image: Tensor | None, W_enc_t: Tensor, bias: Tensor, W_dec: Tensor, theta: Tensor | None,
    gate_scale: Tensor | None, mag_bias: Tensor | None, permutation: Tensor | None, activation: str, normalize: str,
    mode: str, density: float | None, k: int, top_features: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    _check(x, g, image, W_enc_t, W_dec, permutation, top_features)
    if g.numel() == 0 or x.numel() == 0:
        nothing = empty_score(x, g.shape[:2], top_features)
        return tuple(t.fill_(-1) if t.dtype == torch.int64 else t.zero_() for t in nothing)
    problem = _problem(
        x, g, image, W_enc_t, bias, W_dec, theta, gate_scale, mag_bias, permutation, activation, normalize, mode
    )
    features = len(W_enc_t)
    share = k / features if activation.startswith("topk") else density
    if tiling.route(activation, share, top_features > 0 or problem.g is None, device_name(x)) == "sparse":
        kept = k if activation.startswith("topk") else 0
        outputs = sparse(problem, kept, activation == "topk_signed", top_features)
    else:
        outputs = dense(problem, top_features)
    if mode == "activation_only" and image is not None:
        outputs = tuple(t[image] for t in outputs)
    if not top_features:
        outputs += empty_score(x, g.shape[:2], 0)[1:]
    return outputs


torch.library.define(
    "fga_fast::triton_score",
    "(Tensor x, Tensor g, Tensor? image, Tensor W_enc_t, Tensor bias, Tensor W_dec, Tensor? theta, Tensor? gate_scale, "
    "Tensor? mag_bias, Tensor? permutation, str activation, str normalize, str mode, float? density, "
    "int k, int top_features) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl("fga_fast::triton_score", ("cpu", "cuda") if INTERPRETED else "cuda", _run)
register_score_rules("triton_score")
