"""ViT-Prisma SAE checkpoints (Joseph et al.), both layouts.

(i)  ``n_images_<N>.pt`` of its trainer: {"cfg": a pickled VisionModelSAERunnerConfig, "state_dict": ...}. Refused
     unless the caller allows it; the one class then becomes a plain record and no code of the file runs.
(ii) the public repositories: a bare state dict ``.pt`` and ``config.json`` beside it.

Tensors: W_enc [C, F], W_dec [F, C], b_enc [F], b_dec [C]; gated adds b_gate, r_mag, b_mag [F]. Only the settings below
are read; file names in the configuration (dataset, cached activations, checkpoint) are never followed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fga_fast.sae.checks import GATED_NAMES
from fga_fast.sae.formats.checkpoint import CONFIG_CLASS, Checkpoint, ConfigRecord
from fga_fast.sae.formats.options import AS_STORED, Options
from fga_fast.sae.formats.parameters import Loaded, check_sizes
from fga_fast.sae.formats.scope import check_scope, describe, warn_unnamed
from fga_fast.sae.normalise import check_normalisation

NAME = "vit-prisma"
TAKES = ("normalize",)
HOOK = "hook_resid_post"

_STANDARD = ("W_enc", "W_dec", "b_enc", "b_dec")
_GATED = ("W_enc", "W_dec", "b_dec", *GATED_NAMES)
_NORMALISATIONS = {None: None, "none": None, "layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}


def matches(found: Checkpoint) -> bool:
    """Whether ``torch.save`` wrote tensors of these names, or a trainer's pair of configuration and state dict."""
    known = not found.names.isdisjoint((*_STANDARD, *GATED_NAMES))
    return found.kind == "torch" and (known or found.saved("cfg") is not None)


def load(found: Checkpoint, options: Options) -> Loaded:
    """Read a ViT-Prisma SAE; see `SparseAutoencoder.from_pretrained`."""
    weights, cfg = found.weights, found.saved("cfg")
    config, where = found.required_config("config.json") if cfg is None else (_fields(cfg, weights), f"{weights}: cfg")
    config = {name: _plain(value) for name, value in config.items()}
    gated = not found.names.isdisjoint(GATED_NAMES)
    state = found.require(NAME, _GATED if gated else _STANDARD, ("b_enc",) if gated else ())
    _check_place(config, where)
    d_sae = state["b_gate" if gated else "b_enc"].numel()
    check_sizes(config, {"d_in": state["b_dec"].numel(), "d_sae": d_sae}, where)
    activation, k = _activation(config, gated, where)
    settings = {
        "activation": activation,
        "k": k,
        "normalize": _normalisation(config, options.normalize, where),
        "metadata": _metadata(config, weights),
    }
    return Loaded({"b_enc": None, **state, **settings}, str(weights))


def _fields(cfg: object, weights: Path) -> dict[str, Any]:
    if isinstance(cfg, ConfigRecord):
        return cfg.fields
    if isinstance(cfg, dict):
        return cfg
    raise ValueError(f"{weights}: cfg: expected a {CONFIG_CLASS} or a dict, got {type(cfg).__name__}")


def _plain(value: Any) -> Any:
    """Undo the ``{"__type__": ..., "value": ...}`` wrapping of older config.json files."""
    if isinstance(value, dict) and set(value) == {"__type__", "value"}:
        return value["value"]
    return value


def _check_place(config: dict[str, Any], where: str) -> None:
    """Refuse SAEs that were trained on something other than the residual stream of patches after a block."""
    check_scope(config, where)
    if "layer_subtype" not in config and "hook_point" not in config:
        warn_unnamed(where)
    subtype = config.get("layer_subtype", str(config.get("hook_point", HOOK)).rpartition(".")[2])
    if subtype != HOOK:
        raise ValueError(
            f"{where}: layer_subtype: expected {HOOK!r} (the residual stream after a block), got {subtype!r}"
        )


def _activation(config: dict[str, Any], gated: bool, where: str) -> tuple[str, int | None]:
    architecture = config.get("architecture", "gated" if gated else "standard")
    if architecture != ("gated" if gated else "standard"):
        raise ValueError(
            f"{where}: architecture: the weights are those of a {'gated' if gated else 'standard'} SAE, got "
            f"{architecture!r}"
        )
    name = config.get("activation_fn_str")
    if name == "tanh-relu":
        raise ValueError(f"{where}: activation_fn_str: 'tanh-relu' is not supported; its codes saturate at 1")
    if name == "relu":
        return ("gated" if gated else "relu"), None
    if name != "topk" or gated:
        raise ValueError(
            f"{where}: activation_fn_str: expected 'relu'{'' if gated else ' or topk'} for this SAE, got {name!r}"
        )
    kwargs = config.get("activation_fn_kwargs")
    k = kwargs.get("k") if isinstance(kwargs, dict) else None
    if type(k) is not int:
        raise ValueError(f"{where}: activation_fn_kwargs.k: activation 'topk' needs an integer, got {k!r}")
    return "topk", k


def _normalisation(config: dict[str, Any], given: str | None, where: str) -> str | None:
    """The SAE's normalisation; a file that does not name one is refused unless the caller does.

    The trainer's default changed from none to layer_norm over time, so a missing entry has no safe reading.
    """
    if given != AS_STORED:
        check_normalisation(given)
    if "normalize_activations" not in config:
        if given == AS_STORED:
            raise ValueError(
                f"{where}: normalize_activations is missing, and ViT-Prisma's default changed over time; pass "
                "normalize=None, 'layer_norm' or 'constant_norm', and compare self_check() with the SAE's card"
            )
        return given
    value = config["normalize_activations"]
    if not (value is None or isinstance(value, str)) or value not in _NORMALISATIONS:
        names = ", ".join(repr(name) for name in _NORMALISATIONS)
        raise ValueError(f"{where}: normalize_activations: expected one of {names}, got {value!r}")
    stored = _NORMALISATIONS[value]
    if given not in (AS_STORED, stored):
        raise ValueError(f"normalize: {where} says {value!r}, got {given!r}; leave normalize out")
    return stored


def _metadata(config: dict[str, Any], weights: Path) -> dict[str, str]:
    layer = config.get("hook_point_layer")
    layer = layer if type(layer) is int else None
    hook = None if layer is None else f"blocks.{layer}.{HOOK}"
    return describe(NAME, weights.name, hook, layer, config.get("model_name"))
