"""overcomplete: a state dict saved by the user (torch.save or safetensors); the library itself has no file format.

Tensors: encoder.final_block.0.weight [F, C] and .bias [F] (then perhaps a BatchNorm as final_block.1), or
encoder.weight and encoder.bias; dictionary._weights [F, C], or dictionary.C [P, C], .W [F, P] and .Relax [F, C] of an
archetypal dictionary; dictionary.multiplier []; thresholds [F] of a JumpSAE, stored as logs.

    z = x E^T + e
    relu(z); topk: the k largest of relu(z); jump: relu(z) where relu(z) >= exp(thresholds); batch top-k: relu(z) where
    relu(z) >= the running threshold, which is not in the state dict
    reconstruction f D, with D the dictionary, normalised, times exp(multiplier)

A state dict does not hold which of these an SAE is, k, or the normalisation: the caller gives them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fga_fast.sae.formats.checkpoint import Checkpoint
from fga_fast.sae.formats.options import Options
from fga_fast.sae.formats.parameters import Loaded, Parameters, folded, oriented, reached
from fga_fast.sae.formats.scope import describe

NAME = "overcomplete"
TAKES = ("activation", "k", "threshold", "decoder_norm", "pre_mean", "pre_scale")

_LINEAR = ("encoder.final_block.0", "encoder")
_BATCH_NORM = "encoder.final_block.1."
_BATCH_NORM_EPS = 1e-5  # of torch.nn.BatchNorm1d, which overcomplete does not change
_DICTIONARY = "dictionary."
_THRESHOLDS = "thresholds"
_ACTIVATIONS = ("relu", "topk", "batch_topk")
NORMS = ("l2", "max_l2", "l1", "max_l1", "identity")
# The library divides by a norm plus this.
_EPS = 1e-8
# Rows further than this from norm 1 are not the "l2" dictionary of a finished training.
_UNIT_TOLERANCE = 0.1


def matches(found: Checkpoint) -> bool:
    """Whether there is a dictionary of overcomplete among the tensors."""
    return any(name.startswith(_DICTIONARY) for name in found.names)


def load(found: Checkpoint, options: Options) -> Loaded:
    """Read an SAE of overcomplete; see `SparseAutoencoder.from_pretrained`."""
    W_enc_t, bias = linear_encoder(found, (_THRESHOLDS,))
    activation, threshold = _activation(found, options, W_enc_t.dtype)
    W_dec = dictionary(found, options, W_enc_t)
    parameters = Parameters(
        W_enc=W_enc_t.t(),
        W_dec=W_dec,
        b_dec=W_dec.new_zeros(W_dec.shape[1]),
        biases={} if bias is None else {"b_enc": bias},
        activation=activation,
        centred=True,
        k=options.k,
        threshold=threshold,
        metadata=describe(NAME, found.weights.name),
    )
    return folded(parameters, options, str(found.weights))


def linear_encoder(found: Checkpoint, others: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
    """The encoder [F, C] and its bias [F]; a BatchNorm is folded in as it acts in eval mode.

    Raises:
        ValueError: an encoder that is not linear, or tensors (other than ``others``) that are not known.
    """
    where = found.weights
    for part, kind in (("mlp_blocks", "an MLP"), ("attention_blocks", "an attention"), ("resnet_blocks", "a ResNet")):
        if any(name.startswith(f"encoder.{part}") for name in found.names):
            raise ValueError(f"{where}: encoder: {kind} encoder is not linear and is not supported")
    if "Q" in found.names:
        raise ValueError(f"{where}: Q: the quantised codes of a QSAE are not supported")
    stem = next((stem for stem in _LINEAR if f"{stem}.weight" in found.names), None)
    if stem is None:
        raise ValueError(
            f"{where}: encoder: no linear encoder among the tensors; codes found by iteration (matching pursuit and "
            "others) are not supported"
        )
    known = {f"{stem}.weight", f"{stem}.bias", *others}
    unknown = sorted(n for n in found.names - known if not n.startswith((_DICTIONARY, _BATCH_NORM)))
    if unknown:
        raise ValueError(f"{where}: tensors not known: {', '.join(unknown[:8])}")
    tensors = found.tensors((f"{stem}.weight", f"{stem}.bias"))
    weight, bias = tensors[f"{stem}.weight"], tensors.get(f"{stem}.bias")
    if weight.ndim != 2 or (bias is not None and bias.ndim != 1):
        raise ValueError(
            f"{where}: {stem}: expected a matrix and a vector, got {[list(t.shape) for t in tensors.values()]}"
        )
    features = len(weight) if bias is None else len(bias)
    weight = oriented(f"{stem}.weight", weight, features, weight.numel() // max(features, 1), where)
    return _with_batch_norm(found, weight, bias)


def _with_batch_norm(found: Checkpoint, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if not any(name.startswith(_BATCH_NORM) for name in found.names):
        return weight, bias
    parts = ("running_mean", "running_var", "weight", "bias")
    tensors = found.tensors(tuple(_BATCH_NORM + part for part in parts))
    if len(tensors) != len(parts) or any(t.shape != (len(weight),) for t in tensors.values()):
        raise ValueError(
            f"{found.weights}: {_BATCH_NORM}*: expected {', '.join(parts)} of a BatchNorm of {len(weight)} features; "
            "a layer norm between encoder and codes is not supported"
        )
    mean, var, gamma, beta = (tensors[_BATCH_NORM + part].double() for part in parts)
    dtype = torch.float32 if weight.dtype.itemsize < 4 else weight.dtype
    scale = gamma / (var + _BATCH_NORM_EPS).sqrt()
    before = torch.zeros_like(mean) if bias is None else bias.double()
    return (weight.double() * scale[:, None]).to(dtype), ((before - mean) * scale + beta).to(dtype)


def dictionary(found: Checkpoint, options: Options, like: Tensor) -> Tensor:
    """The decoder [F, C] as it acts, from the tensors ``dictionary.*``; ``like`` is the encoder [F, C].

    Raises:
        ValueError: tensors missing or of wrong shapes, or a normalisation that cannot be told.
    """
    where = found.weights
    names = sorted(name for name in found.names if name.startswith(_DICTIONARY))
    parts = {name.removeprefix(_DICTIONARY): value for name, value in found.tensors(tuple(names)).items()}
    if set(parts) <= {"_weights", "multiplier"} and "_weights" in parts:
        rows = parts["_weights"]
        if rows.shape != like.shape:
            raise ValueError(
                f"{where}: dictionary._weights: expected shape {list(like.shape)} (that of the encoder), got "
                f"{list(rows.shape)}"
            )
        rows = _normalised(rows.double(), options.decoder_norm, str(where))
    elif set(parts) <= {"C", "W", "Relax", "multiplier"} and set(parts) >= {"C", "W", "Relax"}:
        if options.decoder_norm not in (None, "identity"):
            raise ValueError(f"decoder_norm: an archetypal dictionary is not normalised, got {options.decoder_norm!r}")
        rows = _archetypal(parts["C"], parts["W"], parts["Relax"], like, str(where))
    else:
        raise ValueError(
            f"{where}: dictionary: expected _weights, or C, W and Relax, and multiplier, got {', '.join(sorted(parts))}"
        )
    multiplier = parts.get("multiplier")
    if multiplier is not None:
        if multiplier.numel() != 1:
            raise ValueError(f"{where}: dictionary.multiplier: expected one number, got shape {list(multiplier.shape)}")
        rows = rows * multiplier.double().reshape(()).exp()
    return rows.to(like.dtype)


def _archetypal(
    points: Tensor,  # [P, C]
    weights: Tensor,  # [F, P]
    relax: Tensor,  # [F, C]
    like: Tensor,  # [F, C]
    where: str,
) -> Tensor:
    """Convex combinations of data points plus a bounded shift, as the library rebuilds them before it evaluates.

    The bound is an attribute that the file does not hold. A shift longer than it can only be one optimiser step too
    long, so shifts just above the default bound of 1 are cut back to it, and all others are kept.
    """
    if points.ndim != 2 or tuple(weights.shape) != (len(like), len(points)) or relax.shape != like.shape:
        raise ValueError(
            f"{where}: dictionary: expected C [P, {like.shape[1]}], W [{len(like)}, P] and Relax {list(like.shape)}, "
            f"got {list(points.shape)}, {list(weights.shape)} and {list(relax.shape)}"
        )
    convex = torch.relu(weights.double())
    convex = convex / (convex.sum(dim=1, keepdim=True) + _EPS)
    shift = relax.double()
    length = shift.norm(dim=1, keepdim=True)
    if float(length.max()) <= 1 + _UNIT_TOLERANCE:
        shift = shift / length.clamp(min=1.0)
    return convex @ points.double() + shift


def _normalised(rows: Tensor, kind: str | None, where: str) -> Tensor:
    if kind is not None and kind not in NORMS:
        raise ValueError(f"decoder_norm: expected one of {', '.join(map(repr, NORMS))}, got {kind!r}")
    lengths = rows.norm(dim=1)
    if kind is None and bool(((lengths - 1).abs() > _UNIT_TOLERANCE).any()):
        raise ValueError(
            f"{where}: dictionary._weights: its rows have norms from {float(lengths.min()):.3g} to "
            f"{float(lengths.max()):.3g}, so it was not trained with the default normalisation 'l2', and the file does "
            f"not say with which; pass decoder_norm= one of {', '.join(map(repr, NORMS))}"
        )
    if kind == "identity":
        return rows
    if kind in ("l1", "max_l1"):
        lengths = rows.abs().sum(dim=1)
    if kind in ("max_l2", "max_l1"):
        return rows.div(lengths.max())
    return rows.div(lengths[:, None] + _EPS)


def _activation(found: Checkpoint, options: Options, dtype: torch.dtype) -> tuple[str, Tensor | None]:
    where = found.weights
    if _THRESHOLDS in found.names:
        if (options.activation, options.k, options.threshold) != (None, None, None):
            raise ValueError(f"activation, k, threshold: {where} holds the thresholds of a JumpSAE; leave them out")
        return "jumprelu", reached(found.tensors((_THRESHOLDS,))[_THRESHOLDS].exp(), dtype)
    if options.activation not in _ACTIVATIONS:
        raise ValueError(
            f"activation: {where} is a state dict of overcomplete, which does not say how codes are chosen; pass "
            f"activation= one of {', '.join(map(repr, _ACTIVATIONS))} (with k= or threshold=), got "
            f"{options.activation!r}; codes found by iteration (matching pursuit) or quantised are not supported"
        )
    if options.activation == "batch_topk" and options.threshold is not None:
        return "batch_topk", reached(options.threshold, dtype)
    if options.threshold is not None:
        raise ValueError(f"threshold: belongs to activation 'batch_topk', got it with {options.activation!r}")
    return options.activation, None
