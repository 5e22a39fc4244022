"""visaebench: ``sae.pt`` or ``model.safetensors``, with ``config.json`` or ``config.yaml``.

Tensors: encoder.weight [F, C], encoder.bias [F], decoder.weight [F, C] (a row a feature, unlike torch.nn.Linear's) and
perhaps decoder.bias [C]; or the names of overcomplete. The threshold is _running_threshold [] or jump_thresholds [F]
among the tensors (stored as they are compared, not as logs), or "threshold" in the settings, which comes first.

    z = x E^T + e;    f = relu(z) where relu(z) >= threshold (jumprelu: > threshold), or the k largest of relu(z)

The rows of overcomplete's dictionary are used as they are stored, not normalised, times exp(multiplier).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fga_fast.sae.formats.checkpoint import Checkpoint
from fga_fast.sae.formats.options import Options
from fga_fast.sae.formats.overcomplete import dictionary, linear_encoder
from fga_fast.sae.formats.parameters import Loaded, Parameters, check_sizes, folded, oriented, passed, reached
from fga_fast.sae.formats.scope import check_scope, describe, trained_on

NAME = "visaebench"
TAKES = ("threshold", "decoder_norm", "pre_mean", "pre_scale")
CONFIGS = ("config.json", "config.yaml", "config.yml")

_THRESHOLDS = ("_running_threshold", "running_threshold", "jump_thresholds")
_OWN_THRESHOLDS = (*_THRESHOLDS, "thresholds")  # which among overcomplete's names are logs
_SECTIONS = ("sae", "sae_config", "model", "training", "data", "cfg", "config")
_HOOKS = ("hook", "hook_name", "hook_point", "layer_name")
_BLOCKS = ("layer", "hook_layer", "layer_idx", "layer_index", "block")
_KINDS = {
    "batchtopk": "batch_topk",
    "jumprelu": "jumprelu",
    "jump": "jumprelu",
    "topk": "topk",
    "relu": "relu",
    "standard": "relu",
    "vanilla": "relu",
}


def matches(found: Checkpoint) -> bool:
    """Whether the tensors are those of visaebench: its own names, or overcomplete's with a threshold."""
    if found.names >= {"encoder.weight", "decoder.weight"}:
        return True
    if not any(name.startswith("dictionary.") for name in found.names):
        return False
    return not found.names.isdisjoint(_THRESHOLDS) or "threshold" in _settings(found)[0]


def load(found: Checkpoint, options: Options) -> Loaded:
    """Read an SAE of visaebench; see `SparseAutoencoder.from_pretrained`."""
    config, where = _settings(found)
    check_scope(config, where)
    hook, layer = trained_on(_first(config, *_HOOKS), _first(config, *_BLOCKS), where)
    if "decoder.weight" in found.names:
        b_enc: Tensor | None
        W_enc_t, W_dec, b_enc, b_dec = _own_names(found, where)
    else:
        W_enc_t, b_enc = linear_encoder(found, _THRESHOLDS)
        W_dec = dictionary(found, replace(options, decoder_norm=options.decoder_norm or "identity"), W_enc_t)
        b_dec = W_dec.new_zeros(W_dec.shape[1])
    d_sae, d_model = W_dec.shape
    widths, features = ("d_in", "d_model", "input_dim"), ("d_sae", "n_features", "hidden_dim")
    check_sizes(config, dict.fromkeys(widths, d_model) | dict.fromkeys(features, d_sae), where)
    activation, k, threshold = _activation(found, config, options, W_enc_t.dtype, where)
    parameters = Parameters(
        W_enc=W_enc_t.t(),
        W_dec=W_dec,
        b_dec=b_dec,
        biases={} if b_enc is None else {"b_enc": b_enc},
        activation=activation,
        centred=False,
        k=k,
        threshold=threshold,
        metadata=describe(NAME, found.weights.name, hook, layer, _first(config, "model_name", "backbone")),
    )
    return folded(parameters, options, where)


def _settings(found: Checkpoint) -> tuple[dict[str, Any], str]:
    """The settings, those of known sections among them, and where they are from; empty if there are none."""
    stored = found.config(*CONFIGS)
    if stored is None:
        inner = found.saved("config", "cfg")
        stored = (dict(inner), f"{found.weights}: config") if isinstance(inner, dict) else None
    if stored is None:
        return {}, str(found.weights)
    config, where = stored
    merged: dict[str, Any] = {}
    for section in _SECTIONS:
        if isinstance(config.get(section), dict):
            merged.update(config[section])
    return {**merged, **config}, where


def _own_names(found: Checkpoint, where: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    required = ("encoder.weight", "encoder.bias", "decoder.weight")
    tensors = found.require(NAME, required, ("decoder.bias", *_OWN_THRESHOLDS))
    encoder, bias = tensors["encoder.weight"], tensors["encoder.bias"]
    features = bias.numel()
    width = encoder.numel() // max(features, 1)
    b_dec = tensors.get("decoder.bias", encoder.new_zeros(width))
    W_enc_t = oriented("encoder.weight", encoder, features, width, where)
    return W_enc_t, oriented("decoder.weight", tensors["decoder.weight"], features, width, where), bias, b_dec


def _first(config: dict[str, Any], *names: str) -> Any:
    return next((config[name] for name in names if name in config), None)


def _activation(
    found: Checkpoint, config: dict[str, Any], options: Options, dtype: torch.dtype, where: str
) -> tuple[str, int | None, Tensor | None]:
    stated = next((config[n] for n in ("activation", "sae_type", "architecture") if isinstance(config.get(n), str)), "")
    k = _first(config, "k", "top_k", "topk")
    unsaid = "batchtopk" if k is None else "topk"
    kind = stated.lower().replace("_", "").replace("-", "").removesuffix("sae") or unsaid
    if kind not in _KINDS:
        raise ValueError(f"{where}: architecture: expected one of {', '.join(_KINDS)}, got {stated!r}")
    activation = _KINDS[kind]
    k = k if type(k) is int and activation in ("topk", "batch_topk") else None
    stored = next(iter(found.tensors(_OWN_THRESHOLDS).values()), None)
    if activation in ("relu", "topk"):
        if stored is not None or options.threshold is not None:
            raise ValueError(f"{where}: threshold: {kind!r} has none")
        return activation, k, None
    own = [value for value in (config.get("threshold"), stored) if value is not None]
    if activation == "jumprelu":
        own.reverse()
    if not own and options.threshold is None:
        raise ValueError(
            f"{where}: threshold: expected one among the tensors ({', '.join(_THRESHOLDS)}) or the settings; pass "
            "threshold=, the value from which codes are kept"
        )
    if own and options.threshold is not None:
        raise ValueError(f"threshold: {where}: the checkpoint stores its own; leave it out")
    kept = passed if activation == "jumprelu" else reached
    try:
        return activation, k, kept(own[0] if own else options.threshold, dtype)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
