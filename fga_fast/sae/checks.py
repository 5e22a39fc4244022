"""Argument checks of SparseAutoencoder: every message names the argument, what was expected and what was got."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor

from fga_fast.sae.normalise import check_normalisation
from fga_fast.settings import Activation

DTYPES: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
GATED_NAMES: tuple[str, ...] = ("b_gate", "r_mag", "b_mag")


def check_settings(activation: object, k: object, threshold: object, normalize: object) -> None:
    """Check the settings that do not depend on a tensor's shape.

    Raises:
        ValueError: an unknown activation or normalisation, or ``k`` or ``threshold`` missing or out of place.
        TypeError: ``k`` is not an integer.
    """
    activations = get_args(Activation)
    if activation not in activations:
        raise ValueError(f"activation: expected one of {', '.join(map(repr, activations))}, got {activation!r}")
    check_normalisation(normalize)
    if k is not None and (isinstance(k, bool) or not isinstance(k, int)):
        raise TypeError(f"k: expected an int or None, got {type(k).__name__}")
    if activation in ("topk", "topk_signed") and k is None:
        raise ValueError(f"k: activation {activation!r} needs the number of features kept a token, got None")
    if activation not in ("topk", "topk_signed", "batch_topk") and k is not None:
        raise ValueError(
            f"k: only 'topk', 'topk_signed' and 'batch_topk' take k, got k={k} with activation {activation!r}"
        )
    needs_threshold = activation in ("jumprelu", "batch_topk")
    if needs_threshold and threshold is None:
        raise ValueError(f"threshold: activation {activation!r} needs one (a number, or one a feature), got None")
    if not needs_threshold and threshold is not None:
        raise ValueError(f"threshold: only 'jumprelu' and 'batch_topk' take one, got one with {activation!r}")


def check_weights(
    W_enc: object,  # [C, F]
    W_dec: object,  # [F, C]
) -> tuple[int, int]:
    """Check the two matrices against each other and return (C, F).

    Raises:
        TypeError: not a dense floating-point tensor.
        ValueError: wrong rank, empty, or shapes that do not fit together.
    """
    encoder, decoder = check_tensor("W_enc", W_enc), check_tensor("W_dec", W_dec)
    for name, tensor in (("W_enc", encoder), ("W_dec", decoder)):
        if tensor.ndim != 2 or 0 in tensor.shape:
            raise ValueError(f"{name}: expected a non-empty matrix, got shape {list(tensor.shape)}")
    d_model, d_sae = encoder.shape
    if decoder.shape != (d_sae, d_model):
        hint = "; it looks transposed: pass W_dec.t()" if decoder.shape == encoder.shape else ""
        raise ValueError(
            f"W_dec: expected shape [{d_sae}, {d_model}] ([F, C], from W_enc [C, F] = [{d_model}, {d_sae}]), "
            f"got {list(decoder.shape)}{hint}"
        )
    return d_model, d_sae


def check_tensor(name: str, value: object, shape: tuple[int, ...] | None = None, like: Tensor | None = None) -> Tensor:
    """Return ``value`` if it is a dense tensor of a supported dtype, of ``shape``, with ``like``'s dtype and device.

    Raises:
        TypeError: not a tensor, or a wrong dtype.
        ValueError: sparse, wrong shape, wrong device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        names = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(f"{name}: expected a dtype of {names}, got {value.dtype}")
    if value.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got layout {value.layout}; pass {name}.to_dense()")
    if shape is not None and tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")
    if like is not None and value.dtype != like.dtype:
        raise TypeError(f"{name}: expected dtype {like.dtype} (that of W_enc), got {value.dtype}; convert one of them")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} (that of W_enc), got {value.device}; move one of them")
    return value


def check_threshold(
    threshold: float | Tensor | None,  # [] or [F]
    d_sae: int,
    like: Tensor,
) -> Tensor | None:
    """Return ``threshold`` as a tensor of ``like``'s dtype and device; raise TypeError/ValueError if it cannot be."""
    if threshold is None:
        return None
    if isinstance(threshold, Tensor):
        return check_tensor("threshold", threshold, () if threshold.ndim == 0 else (d_sae,), like=like)
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(f"threshold: expected a number or a tensor [] or [F], got {type(threshold).__name__}")
    return torch.tensor(float(threshold), dtype=like.dtype, device=like.device)


def check_expected_l0(value: object, d_sae: int) -> float | None:
    """Return ``value`` as a float, or None; raise TypeError/ValueError unless it is None or in (0, d_sae]."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected_l0: expected a number or None, got {type(value).__name__}")
    if not 0 < value <= d_sae:  # so that NaN and Inf fail as well
        raise ValueError(f"expected_l0: expected 0 < expected_l0 <= {d_sae} (the SAE's features), got {value}")
    return float(value)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError, naming the tensor and its first bad element, if it holds NaN or Inf."""
    if tensor.is_meta:  # no values to look at
        return
    finite = torch.isfinite(tensor)
    if bool(finite.all()):
        return
    bad = int((~finite).sum())
    first = (~finite).nonzero()[0].tolist()
    raise ValueError(
        f"{name}: holds NaN or Inf ({bad} of {tensor.numel()} elements, first at index {first}, dtype {tensor.dtype}); "
        "the checkpoint is damaged, or its values do not fit this dtype"
    )


def check_activations(
    name: str,
    x: object,  # [..., width]
    width: int,
    weight: Tensor,
) -> Tensor:
    """Return ``x`` if it is a tensor [..., width] of ``weight``'s dtype and device; else raise TypeError/ValueError."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.ndim == 0 or x.shape[-1] != width:
        raise ValueError(f"{name}: expected shape [..., {width}], got {list(x.shape)}")
    if x.dtype != weight.dtype:
        raise TypeError(f"{name}: expected dtype {weight.dtype} (that of the SAE), got {x.dtype}; use sae.to(x.dtype)")
    if x.device != weight.device:
        raise ValueError(f"{name}: expected device {weight.device} (that of the SAE), got {x.device}")
    return x


def check_metadata(metadata: object) -> dict[str, str]:
    """Return ``metadata`` as a plain dict of strings (empty for None); raise TypeError for anything else."""
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata: expected a mapping from str to str or None, got {type(metadata).__name__}")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata[{key!r}]: expected str keys and values, got {type(value).__name__}")
    return dict(metadata)
