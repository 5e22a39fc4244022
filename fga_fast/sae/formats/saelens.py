"""SAELens: a folder with ``sae_weights.safetensors`` and ``cfg.json``.

Tensors: W_enc [C, F], b_enc [F], W_dec [F, C], b_dec [C]; jumprelu adds threshold [F]; gated has b_gate, r_mag, b_mag
[F] in place of b_enc. A finetuning_scaling_factor [F] multiplies the codes before they are decoded.

    z = (normalise(x) - b_dec [if apply_b_dec_to_input]) W_enc + b_enc
    standard relu(z); topk the k largest z, then relu; jumprelu relu(z) where z > threshold

With rescale_acts_by_decoder_norm (topk) z is multiplied by the norms of the decoder rows, which decoding divides out.
Settings of versions before 6.0 have other names; both are read.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fga_fast.sae.formats.checkpoint import Checkpoint
from fga_fast.sae.formats.options import Options
from fga_fast.sae.formats.parameters import Loaded, Parameters, check_sizes, folded, oriented, unit_decoder, widened
from fga_fast.sae.formats.scope import check_scope, describe, trained_on
from fga_fast.sae.formats.writing import Written, dtype_name, plain, write_folder

NAME = "saelens"
TAKES = ("pre_mean", "pre_scale")
WEIGHTS = "sae_weights.safetensors"
CONFIG = "cfg.json"

_COMMON = ("W_enc", "W_dec", "b_dec")
_NEEDS = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "r_mag", "b_mag"),
}
_SCALES = ("finetuning_scaling_factor", "scaling_factor")
_BEFORE_6 = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
_NORMALISATIONS = {"none": None, "layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}
_ARCHITECTURES = {
    "relu": "standard",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "batch_topk": "jumprelu",  # which is what SAELens makes of its own batch top-k
    "gated": "gated",
}
# The layout's version, without which SAELens takes the settings as older ones.
_LAYOUT = "6.0.0"


def matches(found: Checkpoint) -> bool:
    """Whether the tensors are those of SAELens (ViT-Prisma's have the same names, but are written by torch.save)."""
    return found.kind == "safetensors" and not found.names.isdisjoint(("W_enc", "W_dec"))


def save(sae: Written, path: str | os.PathLike[str]) -> Path:
    """Write an SAE to a folder that `sae_lens.SAE.load_from_disk` reads; "batch_topk" becomes its "jumprelu".

    Args:
        sae: the SAE. Of its metadata "hook" (or "layer") and "model_name" become SAELens's own; all of it is kept as
            well, under "fga_fast".
        path: folder; its parent must exist. Files of an earlier save are replaced.

    Returns:
        The folder.

    Raises:
        ValueError: activation "topk_signed", as SAELens has no negative codes.
        OSError: the folder cannot be written.
    """
    if sae.activation not in _ARCHITECTURES:
        raise ValueError(
            f"activation: SAELens has no {sae.activation!r}, only {', '.join(map(repr, _ARCHITECTURES))}; save the SAE "
            'with format="fga_fast" or "saev"'
        )
    architecture = _ARCHITECTURES[sae.activation]
    tensors = plain(sae, *_COMMON, *_NEEDS[architecture])
    if architecture != "gated":
        tensors.setdefault("b_enc", torch.zeros_like(tensors["W_dec"][:, 0]))
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].expand(sae.d_sae).contiguous()
    settings = {
        "architecture": architecture, "d_in": sae.d_model, "d_sae": sae.d_sae, "dtype": dtype_name(sae.W_dec),
        "device": "cpu", "apply_b_dec_to_input": True, "reshape_activations": "none", "metadata": _metadata(sae),
        "normalize_activations": next(name for name, kind in _NORMALISATIONS.items() if kind == sae.normalize),
    }  # fmt: skip
    if architecture == "topk":
        settings |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    return write_folder(path, WEIGHTS, tensors, None, CONFIG, settings)


def _metadata(sae: Written) -> dict[str, Any]:
    layer = sae.metadata.get("layer")
    hook = sae.metadata.get("hook", None if layer is None else f"blocks.{layer}.hook_resid_post")
    told = {"hook_name": hook, "model_name": sae.metadata.get("model_name"), "l0": sae.expected_l0}
    return {"sae_lens_version": _LAYOUT, **told, "fga_fast": sae.metadata}


def load(found: Checkpoint, options: Options) -> Loaded:
    """Read an SAE of SAELens; see `SparseAutoencoder.from_pretrained`."""
    stored, where = found.required_config(CONFIG)
    config = _current(stored)
    architecture = _architecture(config, found, where)
    hook, layer = _scope(config, where)
    normalize = _normalisation(config, options, where)
    unused = ("b_enc",) if architecture == "gated" else ()
    tensors = found.require(NAME, (*_COMMON, *_NEEDS[architecture]), (*_SCALES, *unused))
    parameters = _parameters(config, tensors, architecture, where)
    metadata = describe(NAME, found.weights.name, hook, layer, config.get("model_name"))
    loaded = folded(replace(parameters, normalize=normalize, metadata=metadata), options, where)
    l0 = config.get("l0")  # of the end of its training
    known = isinstance(l0, int | float) and not isinstance(l0, bool) and 0 < l0 <= len(parameters.W_dec)
    return Loaded({**loaded.arguments, "expected_l0": l0 if known else None}, where)


def _current(stored: dict[str, Any]) -> dict[str, Any]:
    """The settings under the names of version 6, those of its "metadata" among them."""
    metadata = stored.get("metadata")
    merged = {**(metadata if isinstance(metadata, dict) else {}), **stored}
    return {_BEFORE_6.get(name, name): value for name, value in merged.items()}


def _architecture(config: dict[str, Any], found: Checkpoint, where: str) -> str:
    architecture = config.get("architecture", "standard")
    if "transcoder" in str(architecture) or "d_out" in config or not found.names.isdisjoint(("W_skip", "b_dec_out")):
        raise ValueError(
            f"{where}: architecture: {architecture!r} is a transcoder, whose decoder writes to another space; it "
            "cannot gate patches"
        )
    if not isinstance(architecture, str) or architecture not in _NEEDS:
        raise ValueError(
            f"{where}: architecture: expected one of {', '.join(map(repr, _NEEDS))}, got {architecture!r}"
            + ("; save the trained SAE for inference, as jumprelu" if "batchtopk" in str(architecture) else "")
        )
    if architecture == "standard" and config.get("activation_fn", "relu") == "topk":  # before 6.0
        return "topk"
    if architecture != "topk" and config.get("activation_fn", "relu") != "relu":
        raise ValueError(
            f"{where}: activation_fn: expected 'relu' or 'topk', got {config['activation_fn']!r}, whose codes cannot "
            "be represented"
        )
    return architecture


def _scope(config: dict[str, Any], where: str) -> tuple[str | None, int | None]:
    """The hook and its block; raises ValueError for anything but the residual stream of patches."""
    check_scope(config, where)
    if config.get("reshape_activations", "none") not in (None, "none"):
        raise ValueError(
            f"{where}: reshape_activations: expected 'none', got {config['reshape_activations']!r}, an SAE of the "
            "attention heads' outputs, which cannot gate patches of the residual stream"
        )
    return trained_on(config.get("hook_name"), config.get("hook_layer"), where)


def _normalisation(config: dict[str, Any], options: Options, where: str) -> str | None:
    value = config.get("normalize_activations")
    if isinstance(value, bool):  # before 3.0
        value = "expected_average_only_in" if value else "none"
    value = "none" if value is None else value
    if value == "expected_average_only_in":
        if options.pre_scale is None:
            raise ValueError(
                f"{where}: normalize_activations: 'expected_average_only_in' needs the scale the activations were "
                "trained with, which the file does not hold; fold it in with SAELens, or pass pre_scale=the mean "
                "norm of the activations / sqrt(d_in)"
            )
        return None
    if not isinstance(value, str) or value not in _NORMALISATIONS:
        names = ", ".join(map(repr, _NORMALISATIONS))
        raise ValueError(f"{where}: normalize_activations: expected one of {names}, got {value!r}")
    return _NORMALISATIONS[value]


def _parameters(config: dict[str, Any], tensors: dict[str, Tensor], architecture: str, where: str) -> Parameters:
    gated = architecture == "gated"
    names = ("b_gate", "b_mag") if gated else ("b_enc",)
    d_model, d_sae = tensors["b_dec"].numel(), tensors[names[0]].numel()
    check_sizes(config, {"d_in": d_model, "d_sae": d_sae}, where)
    k = None
    if architecture == "topk":
        kwargs = config.get("activation_fn_kwargs")
        k = config.get("k", kwargs.get("k") if isinstance(kwargs, dict) else None)
        if type(k) is not int:
            raise ValueError(f"{where}: k: architecture 'topk' needs an integer, got {k!r}")
    parameters = Parameters(
        W_enc=oriented("W_enc", tensors["W_enc"], d_model, d_sae, where),
        W_dec=oriented("W_dec", tensors["W_dec"], d_sae, d_model, where),
        b_dec=tensors["b_dec"],
        biases={name: tensors[name] for name in names},
        activation={"standard": "relu"}.get(architecture, architecture),
        centred=config.get("apply_b_dec_to_input", True) is not False,
        k=k,
        threshold=tensors.get("threshold"),
        r_mag=tensors.get("r_mag"),
    )
    for name in _SCALES:
        if name in tensors:
            parameters = _scaled(parameters, tensors[name], name, where)
    if config.get("rescale_acts_by_decoder_norm"):
        if architecture != "topk":
            raise ValueError(f"{where}: rescale_acts_by_decoder_norm: known for 'topk' only, got {architecture!r}")
        return unit_decoder(parameters)
    return parameters


def _scaled(p: Parameters, scale: Tensor, name: str, where: str) -> Parameters:
    if tuple(scale.shape) != (p.W_dec.shape[0],):
        raise ValueError(f"{where}: {name}: expected shape [{p.W_dec.shape[0]}], got {list(scale.shape)}")
    p = widened(p)
    return replace(p, W_dec=(p.W_dec.double() * scale.double()[:, None]).to(p.W_dec.dtype))
