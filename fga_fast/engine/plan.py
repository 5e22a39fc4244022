"""Checks of how an `Explainer` is set up: each error names the argument, what was expected, what came, what to do."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import nn

from fga_fast.models import refused
from fga_fast.models.layout import ModelLayout
from fga_fast.settings import Gate

if TYPE_CHECKING:
    from fga_fast.explainer import Explainer

logger = logging.getLogger(__name__)

_CHOICES = {"method": ("rollout", "input_x_gradient"), "backward": ("exact", "conservative")}


def check_layout(layout: ModelLayout, model: nn.Module) -> None:
    """Refuses a layout of something else than this model."""
    if not isinstance(layout, ModelLayout):
        raise TypeError(f"layout: expected a ModelLayout, got {type(layout).__name__}")
    inside = set(model.modules())
    for index, block in enumerate(layout.blocks):
        hidden = refused.opaque(block)
        if hidden is not None:
            raise ValueError(f"layout: blocks[{index}] ({type(block).__name__}) cannot be explained: {hidden}")
        if block not in inside:
            raise ValueError(
                f"layout: blocks[{index}] ({type(block).__name__}) is no module inside the model; take the blocks from "
                "the very model that is explained"
            )
    if next((layout.tower or model).parameters(), None) is None:
        raise ValueError("model: it has no parameters, so there is nothing to differentiate")


def check(explainer: Explainer) -> None:
    """Refuses settings that do not fit each other or the model."""
    if not isinstance(explainer.gate, Gate):
        raise TypeError(f"gate: expected a Gate such as Gate(base=10.0), got {type(explainer.gate).__name__}")
    for name, known in _CHOICES.items():
        if getattr(explainer, name) not in known:
            raise ValueError(f"{name}: expected {' or '.join(map(repr, known))}, got {getattr(explainer, name)!r}")
    for name in ("signed", "per_block"):
        if not isinstance(getattr(explainer, name), bool):
            raise TypeError(f"{name}: expected True or False, got {getattr(explainer, name)!r}")
    last = len(explainer.layout.blocks) - 1
    _check_count("start_layer", explainer.start_layer, 0, last, "blocks")
    _check_count("target_chunk", explainer.target_chunk, 1, None, "")
    for layer in explainer.saes:
        if layer < explainer.start_layer:
            raise ValueError(
                f"saes[{layer}]: would gate nothing, since start_layer={explainer.start_layer} leaves block {layer} "
                "out; lower start_layer or leave the SAE out"
            )
        told = explainer.saes[layer].metadata.get("layer", str(layer))
        if told.isdecimal() and int(told) != layer:
            logger.warning(
                "saes[%d]: its checkpoint says it was trained on block %s; sae.self_check tells whether it fits here",
                layer, told,
            )  # fmt: skip
    _check_top_features(explainer)
    if explainer.method == "rollout" and explainer.layout.pooling == "token" and last in explainer.saes:
        logger.warning("the SAE after the last block gates nothing: only the class token is read there")


def _check_top_features(explainer: Explainer) -> None:
    count, mode = explainer.top_features, explainer.gate.mode
    _check_count("top_features", count, 0, None, "")
    if not count:
        return
    if mode in ("gradient_only", "no_sae"):
        raise ValueError(f"top_features: gate mode {mode!r} has no feature contributions to rank")
    if not explainer.saes:
        raise ValueError(f"top_features: got {count}, but there are no SAEs; give saes={{...}}")
    fewest = min(sae.d_sae for sae in explainer.saes.values())
    _check_count("top_features", count, 0, fewest, "features of the smallest SAE")


def _check_count(name: str, value: object, least: int, most: int | None, of: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least or (most is not None and value > most):
        wanted = f"at least {least}" if most is None else f"{least} to {most} ({of})"
        raise ValueError(f"{name}: expected {wanted}, got {value}")
