"""saev: one file ``sae.pt``, a line of JSON and then what ``torch.save`` writes for a state dict.

Tensors: W_enc [C, F], b_enc [F], W_dec [F, C], b_dec [C]; batch top-k adds activation.threshold [].

    z = x W_enc + b_enc    (files without "schema" in their header: (x - b_dec) W_enc + b_enc)
    relu(z); top-k: the k largest z, which may be negative; batch top-k: relu(z) where z > threshold

What was done to the activations before (a mean subtracted, a scale divided out) is not in the file: the caller gives
pre_mean and pre_scale.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fga_fast.io.atomic import atomic_write
from fga_fast.sae.formats.checkpoint import Checkpoint
from fga_fast.sae.formats.options import Options
from fga_fast.sae.formats.parameters import Loaded, Parameters, check_sizes, folded, oriented
from fga_fast.sae.formats.scope import check_scope, describe
from fga_fast.sae.formats.writing import Written, plain

NAME = "saev"
TAKES = ("threshold", "pre_mean", "pre_scale", "subtract_b_dec")

_REQUIRED = ("W_enc", "b_enc", "W_dec", "b_dec")
_THRESHOLD = "activation.threshold"
_NEWEST_SCHEMA = 5
_WRITTEN_SCHEMA = 4  # read alike by saev's versions of schema 4 and 5
# Upstream looks the class up by the name in the file; here a name can only pick from this table.
_ACTIVATIONS = {"Relu": "relu", "TopK": "topk_signed", "BatchTopK": "batch_topk"}


def matches(found: Checkpoint) -> bool:
    """Whether the file starts with a line of JSON."""
    return found.kind == "saev"


def save(sae: Written, path: str | os.PathLike[str], *, schema: int | None = _WRITTEN_SCHEMA) -> Path:
    """Write an SAE to one file that `saev.nn.load` reads.

    Args:
        sae: an SAE with activation "relu", "topk_signed", or "batch_topk" with one threshold for all features.
        path: the file, by custom `sae.pt`; its folder must exist. An earlier one is replaced.
        schema: 4, or None for the layout of saev 0.1.0 (April 2025), which knows "relu" only and needs a whole
            multiple of the width as the number of features.

    Returns:
        The file.

    Raises:
        ValueError: what the layout cannot say: another activation (saev's top-k keeps negative codes, which "topk" does
            not), a normalisation, thresholds that differ, or "batch_topk" without k.
        OSError: the file cannot be written.
    """
    if schema not in (None, _WRITTEN_SCHEMA):
        raise ValueError(f"schema: expected {_WRITTEN_SCHEMA} or None, got {schema!r}")
    if sae.normalize is not None:
        raise ValueError(f'normalize: saev\'s layout has none, got {sae.normalize!r}; save with format="fga_fast"')
    known = [name for name, kind in _ACTIVATIONS.items() if kind == sae.activation and (schema or name == "Relu")]
    if not known:
        written = ["relu"] if schema is None else list(_ACTIVATIONS.values())
        raise ValueError(
            f"activation: this layout of saev has only {', '.join(map(repr, written))}, got {sae.activation!r}; save "
            'with format="fga_fast" or "saelens"'
        )
    state = plain(sae, "W_enc", "W_dec", "b_dec")
    # From schema 1 on, saev does not subtract b_dec before it encodes.
    state["b_enc"] = sae.bias.cpu() if schema else plain(sae, "b_enc").get("b_enc", torch.zeros_like(sae.bias.cpu()))
    if sae.threshold is not None:
        if bool((sae.threshold != sae.threshold.reshape(-1)[0]).any()):
            raise ValueError('threshold: saev has one for all features, got others; save with format="saelens"')
        state[_THRESHOLD] = sae.threshold.reshape(-1)[0].cpu().clone()
    return atomic_write(path, json.dumps(_header(sae, schema, known[0])).encode() + b"\n" + _packed(state))


def _header(sae: Written, schema: int | None, activation: str) -> dict[str, Any]:
    if schema is None:
        if sae.d_sae % sae.d_model:
            raise ValueError(
                f"schema: the layout of saev 0.1.0 needs a multiple of the width {sae.d_model} as the number of "
                f"features, got {sae.d_sae}; save with schema={_WRITTEN_SCHEMA}"
            )
        return {"d_vit": sae.d_model, "exp_factor": sae.d_sae // sae.d_model}
    if activation != "Relu" and sae.k is None:
        raise ValueError("k: saev's BatchTopK stores the number of features kept a token, got None")
    params = {} if activation == "Relu" else {"top_k": sae.k}
    config = {"d_model": sae.d_model, "d_sae": sae.d_sae, "activation": {"cls": activation, "params": params}}
    return {"schema": schema, "cfg": config, "commit": "unknown", "lib": "fga_fast"}


def _packed(state: Mapping[str, Tensor]) -> bytes:
    archive = io.BytesIO()
    torch.save(dict(state), archive)
    return archive.getvalue()


def load(found: Checkpoint, options: Options) -> Loaded:
    """Read an SAE of saev; see `SparseAutoencoder.from_pretrained`."""
    where = f"{found.weights}: header"
    schema = found.header.get("schema")
    if schema is not None and (type(schema) is not int or not 1 <= schema <= _NEWEST_SCHEMA):
        raise ValueError(f"{where}: schema: expected 1 to {_NEWEST_SCHEMA} or none, got {schema!r}")
    config = found.header if schema is None else found.header.get("cfg")
    if not isinstance(config, dict):
        raise ValueError(f"{where}: cfg: expected an object, got {type(config).__name__}")
    check_scope({**config, **found.header}, where)
    activation, k = _activation(found.header, config, where)
    tensors = found.require(NAME, _REQUIRED, (_THRESHOLD,) if activation == "batch_topk" else ())
    threshold = _threshold(tensors, options, activation, where)
    d_model, d_sae = tensors["b_dec"].numel(), tensors["b_enc"].numel()
    check_sizes(config, {"d_vit": d_model, "d_model": d_model, "d_sae": d_sae}, where)
    parameters = Parameters(
        W_enc=oriented("W_enc", tensors["W_enc"], d_model, d_sae, found.weights),
        W_dec=oriented("W_dec", tensors["W_dec"], d_sae, d_model, found.weights),
        b_dec=tensors["b_dec"],
        biases={"b_enc": tensors["b_enc"]},
        activation=activation,
        centred=schema is None if options.subtract_b_dec is None else options.subtract_b_dec,
        k=k,
        threshold=threshold,
        metadata=describe(NAME, found.weights.name),
    )
    return folded(parameters, options, str(found.weights))


def _activation(header: Mapping[str, Any], config: dict[str, Any], where: str) -> tuple[str, int | None]:
    """The activation's name here and its k. Headers name it in three ways, by age."""
    entry = config.get("activation")
    if isinstance(entry, dict):
        name, params = entry.get("cls"), entry.get("params")
    elif header.get("schema") == 1 and str(header.get("cls")) in _ACTIVATIONS:
        name, params = header["cls"], config
    else:
        name, params = ("Relu", None) if entry is None else (entry, None)
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise ValueError(f"{where}: activation: expected one of {', '.join(_ACTIVATIONS)}, got {name!r}")
    k = params.get("top_k") if isinstance(params, dict) else None
    if name == "TopK" and type(k) is not int:
        raise ValueError(f"{where}: top_k: activation TopK needs an integer, got {k!r}")
    return _ACTIVATIONS[name], k if name != "Relu" and type(k) is int else None


def _threshold(tensors: dict[str, Tensor], options: Options, activation: str, where: str) -> float | Tensor | None:
    stored = tensors.get(_THRESHOLD)
    if activation != "batch_topk":
        if options.threshold is not None:
            raise ValueError(f"threshold: {where} says {activation}, which has none; leave it out")
        return None
    if stored is not None:
        if options.threshold is not None:
            raise ValueError(f"threshold: {where}: the file stores its own; leave it out")
        if stored.numel() != 1:
            raise ValueError(f"{where}: {_THRESHOLD}: expected one number, got shape {list(stored.shape)}")
        return stored
    if options.threshold is None:
        raise ValueError(
            f"{where}: activation: BatchTopK without {_THRESHOLD} is of an early version, which chose its codes by "
            "whole batches, or token by token; pass threshold=, the value above which codes are kept"
        )
    return options.threshold
