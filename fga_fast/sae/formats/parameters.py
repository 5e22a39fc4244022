"""From a format's own parameters to the arguments of `SparseAutoencoder`: scales and input statistics are folded in.

A format encodes ``z = (u - c b_dec) W_enc + b_enc`` with ``u = (x - pre_mean) / pre_scale`` and c 0 or 1, and
reconstructs ``pre_scale (f W_dec + b_dec) + pre_mean``. With

    W_enc' = W_enc / pre_scale,  W_dec' = pre_scale W_dec,  b_dec' = pre_scale b_dec + pre_mean,
    b_enc' = b_enc + (1 - c) b_dec W_enc

SparseAutoencoder's ``z = (x - b_dec') W_enc' + b_enc'`` is the same z, and the decoder rows lie in the residual
stream's own space, where the gradient they are multiplied with lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fga_fast.io.torch_file import check_size
from fga_fast.sae.checks import DTYPES, check_finite
from fga_fast.sae.folding import folded_centring
from fga_fast.sae.formats.options import Options


class Loaded(NamedTuple):
    """What a format read."""

    arguments: dict[str, Any]  # of SparseAutoencoder, by name
    where: str  # the file that an error in them names


@dataclass(frozen=True)
class Parameters:
    """An SAE as its format stores it, its matrices already [C, F] and [F, C]; `biases` are added to u W_enc."""

    W_enc: Tensor  # [C, F]
    W_dec: Tensor  # [F, C]
    b_dec: Tensor  # [C]
    biases: Mapping[str, Tensor]  # b_enc, or b_gate and b_mag: [F] each
    activation: str
    centred: bool  # whether the format subtracts b_dec before it encodes
    k: int | None = None
    threshold: float | Tensor | None = None  # [] or [F]
    normalize: str | None = None
    r_mag: Tensor | None = None  # [F]
    metadata: Mapping[str, str] = field(default_factory=dict)


def folded(parameters: Parameters, options: Options, where: str) -> Loaded:
    """The arguments of the SAE in the residual stream's own space, in the file's dtype.

    A 16-bit file becomes float32 where something is folded.

    Raises:
        ValueError: input statistics of a wrong shape or not usable here.
    """
    try:
        p = parameters
        if not p.centred and bool((p.b_dec != 0).any()):
            p = _uncentred(widened(p))
        if options.pre_mean is not None or options.pre_scale is not None:
            p = _in_stream(widened(p), options)
        threshold = p.threshold
        if isinstance(threshold, Tensor):
            threshold = threshold.to(p.W_enc).reshape(() if threshold.numel() == 1 else (-1,))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    arguments = {
        "W_enc": p.W_enc, "W_dec": p.W_dec, "b_dec": p.b_dec, "b_enc": None, **p.biases, "r_mag": p.r_mag,
        "activation": p.activation, "k": p.k, "threshold": threshold, "normalize": p.normalize, "metadata": p.metadata,
    }  # fmt: skip
    return Loaded(arguments, where)


def widened(p: Parameters) -> Parameters:
    """The same SAE with at least float32 tensors: folded 16-bit weights would be rounded a second time."""
    if p.W_enc.dtype not in (torch.float16, torch.bfloat16):
        return p
    tensors: dict[str, Any] = {name: value.float() for name, value in vars(p).items() if isinstance(value, Tensor)}
    return replace(p, **tensors, biases={name: bias.float() for name, bias in p.biases.items()})


def unit_decoder(p: Parameters) -> Parameters:
    """Move the decoder rows' norms into the encoder: z becomes z ||W_dec[k]||, and every contribution stays the same.

    A row of zeros has no direction; its feature is switched off, as the format multiplies its z by 0.
    """
    p = widened(p)
    norm = p.W_dec.double().norm(dim=1)  # [F]
    divisor = torch.where(norm == 0, torch.ones_like(norm), norm)
    dtype = p.W_enc.dtype
    return replace(
        p,
        W_enc=(p.W_enc.double() * norm).to(dtype),
        W_dec=(p.W_dec.double() / divisor[:, None]).to(dtype),
        biases={name: (bias.double() * norm).to(dtype) for name, bias in p.biases.items()},
    )


def passed(threshold: object, dtype: torch.dtype) -> Tensor:
    """The threshold as a tensor.

    Raises:
        ValueError: not a number or a tensor of numbers, or NaN or Inf.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float, Tensor)):
        raise ValueError(f"threshold: expected a number or a tensor, got {threshold!r}")
    if isinstance(threshold, int) and abs(threshold) > 1 << 62:  # no tensor takes it
        raise ValueError("threshold: expected a number of a usual size, got a larger one")
    value = torch.as_tensor(threshold, dtype=dtype, device="cpu")
    check_finite("threshold", value)
    return value


def reached(threshold: object, dtype: torch.dtype) -> Tensor:
    """The threshold t' with ``z > t'`` exactly where ``z >= threshold``: the next smaller number; see `passed`."""
    value = passed(threshold, dtype)
    return torch.nextafter(value, torch.full_like(value, -torch.inf))


def _uncentred(p: Parameters) -> Parameters:
    centring = folded_centring(p.W_enc.t(), p.b_dec)  # [F]
    dtype = p.W_enc.dtype
    added = {"b_enc": centring, "b_gate": centring}
    if p.r_mag is not None:
        added["b_mag"] = centring * p.r_mag.double().exp()
    biases = {name: (bias.double() + added[name]).to(dtype) for name, bias in p.biases.items()}
    return replace(p, biases=biases)


def _in_stream(p: Parameters, options: Options) -> Parameters:
    if p.normalize is not None:
        raise ValueError(
            f"pre_mean, pre_scale: the file says normalisation {p.normalize!r}, which replaces them; leave them out"
        )
    width = p.W_enc.shape[0]
    mean = _statistic("pre_mean", [0.0] * width if options.pre_mean is None else options.pre_mean, [width])
    scale = _statistic("pre_scale", 1.0 if options.pre_scale is None else options.pre_scale, [width], []).expand(width)
    if not bool((scale > 0).all()):
        raise ValueError("pre_scale: expected numbers above 0")
    dtype = p.W_enc.dtype
    return replace(
        p,
        W_enc=(p.W_enc.double() / scale[:, None]).to(dtype),
        W_dec=(p.W_dec.double() * scale).to(dtype),
        b_dec=(p.b_dec.double() * scale + mean).to(dtype),
        metadata={**p.metadata, "input_statistics": "folded in when loaded"},
    )


def _statistic(name: str, value: Any, *shapes: list[int]) -> Tensor:
    """``value`` as float64 of one of ``shapes``."""
    try:
        tensor = torch.as_tensor(value, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected numbers, got {type(value).__name__} ({error})") from error
    if list(tensor.shape) not in shapes:
        wanted = f"shape {shapes[0]} (the SAE's width)" + (" or a number" if [] in shapes else "")
        raise ValueError(f"{name}: expected {wanted}, got {list(tensor.shape)}")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name}: holds NaN or Inf")
    return tensor


def check_sizes(config: Mapping[str, Any], sizes: Mapping[str, int], where: str, *unset: object) -> None:
    """Raise ValueError if the settings name another size than the weights have; ``unset`` values say nothing."""
    for name, size in sizes.items():
        if config.get(name) not in (None, size, *unset):
            got = config[name]
            raise ValueError(f"{where}: {name}: the weights have {size}, got {got!r}; files of different SAEs?")


def check_stored(name: str, value: object, where: object) -> Tensor:
    """Return ``value`` if it is a dense floating-point tensor that the file stores in full.

    Raises:
        ValueError: anything else, or a tensor that claims more bytes than its file stores.
    """
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.dtype not in DTYPES:
        got = f"{value.dtype}, {value.layout}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{where}: {name}: expected a dense floating-point tensor, got {got}")
    check_size(name, value, where)
    return value.detach()


def oriented(name: str, value: Tensor, rows: int, columns: int, where: object) -> Tensor:
    """Return ``value`` as [rows, columns], transposed where its shape says that it is stored the other way round.

    Raises:
        ValueError: neither shape, or a square matrix, whose orientation no shape can tell.
    """
    if rows == columns and tuple(value.shape) == (rows, columns):
        raise ValueError(
            f"{where}: {name}: its orientation cannot be told from the shape [{rows}, {columns}] of an SAE with as "
            "many features as the width; build SparseAutoencoder(W_enc, b_enc, W_dec, b_dec, ...) from its tensors"
        )
    if tuple(value.shape) == (rows, columns):
        return value
    if tuple(value.shape) == (columns, rows):
        return value.t()
    raise ValueError(
        f"{where}: {name}: expected shape [{rows}, {columns}] or [{columns}, {rows}] (from the other tensors), got "
        f"{list(value.shape)}"
    )
