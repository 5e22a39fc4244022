"""Checks of how an `Explainer` is set up: each error names the argument, what was expected, what came, what to do."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fga_fast.models import refused
from fga_fast.models.layout import ModelLayout
from fga_fast.settings import Gate

if TYPE_CHECKING:
    from fga_fast.engine.tape import Tape
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


def warn_of_other_pooling(tape: Tape, values: Tensor, layout: ModelLayout) -> None:
    """Says so where the values depend on other tokens of the last residual stream than the layout's pooled ones, not on
    all of these, or on attention after the blocks that is not the layout's pool.

    That is how a wrong `ModelLayout` shows, and a wrapper that pools the tower's tokens itself.
    """
    stream, last = tape.last_stream, layout.pooled[1] - 1
    if stream is None or layout.pooling == "attention" or not (stream.requires_grad and values.requires_grad):
        return
    g, *others = torch.autograd.grad(
        values.sum(), [stream, *(x for x in tape.outside if x.requires_grad)], retain_graph=True, materialize_grads=True
    )
    read = (g != 0).flatten(2).any(-1).any(1 if layout.tokens_first else 0).tolist()  # [N]
    besides = [token for token, is_read in enumerate(read) if is_read and not layout.pooled[0] <= token <= last]
    if besides:
        what = f"{len(besides)} token(s) of the last residual stream besides the pooled ones, such as {besides[0]}"
    elif any(read) and not all(read[layout.pooled[0] : last + 1]):
        what = "only some of the pooled tokens of the last residual stream"
    elif any(bool(other.any()) for other in others):
        what = "attention after the blocks, which the layout does not know of"
    else:
        return
    logger.warning(
        "the explained value depends on %s, pooled being tokens %d to %d (%s), so the rollout starts from the wrong "
        "place or from a part only; if the model pools otherwise, pass layout=ModelLayout(...) that says how",
        what, layout.pooled[0], last, layout.pooling,
    )  # fmt: skip
