"""Which activations an SAE was trained on: only the residual stream of patches after a block can be gated."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

_log = logging.getLogger(__name__)

# Names of the residual stream after a block, in TransformerLens's words and as a bare module path ("...layers.9").
_AFTER = frozenset({"", "hook_resid_post", "resid_post", "output", "hook_output"})
_BEFORE = frozenset({"hook_resid_pre", "resid_pre", "input"})
_NUMBER = re.compile(r"(?:(?:layer|block|resblock)s?_?)?(\d{1,4})", re.IGNORECASE)
_ELSEWHERE = re.compile(
    r"mlp|att|fc\d|hook_[zqkv]\b|hook_result|resid_mid|embed|patch|norm|\bln|logit|head", re.IGNORECASE
)
_CLASS_TOKEN = frozenset({"cls", "class", "cls_token", "class_token", "cls_only", "cls_token_only"})


def residual_layer(hook: str, where: str) -> int | None:
    """The block whose output ``hook`` names; None where it names none.

    The residual stream before block l is the one after block l - 1.

    Raises:
        ValueError: the hook is not the residual stream after a block.
    """
    parts = re.split(r"[./]", hook)
    numbered = [index for index, part in enumerate(parts) if _NUMBER.fullmatch(part)]
    if numbered:
        layer: int | None = int(_NUMBER.fullmatch(parts[numbered[-1]])[1])  # type: ignore[index]
        place = ".".join(parts[numbered[-1] + 1 :])
        below = ".".join(parts[numbered[0] + 1 :])
    else:
        layer, place, below = None, parts[-1], parts[-1]
    if _ELSEWHERE.search(below):
        place = below
    if place in _AFTER:
        return layer
    if place in _BEFORE and layer:
        return layer - 1
    if layer is not None or place in _BEFORE or _ELSEWHERE.search(place):
        raise ValueError(
            f"{where}: hook: expected the residual stream after a block (such as 'blocks.9.hook_resid_post'), got "
            f"{hook!r}, which cannot gate patches of it"
        )
    _log.warning("%s: hook %r is not known; taken as the residual stream after a block", where, hook)
    return None


def warn_unnamed(where: str) -> None:
    """Log that a file does not say which activations its SAE was trained on."""
    _log.warning("%s: does not say which activations the SAE was trained on; taken as hook_resid_post", where)


def trained_on(hook: object, number: object, where: str) -> tuple[str | None, int | None]:
    """The hook and the block that the settings name; None for one that they do not name. Logs a missing hook."""
    if isinstance(number, str):  # a module's path instead of a number
        hook, number = hook or number, None
    block = number if type(number) is int and number >= 0 else None
    if not isinstance(hook, str):
        warn_unnamed(where)
        return None, block
    named = residual_layer(hook, where)
    return hook, block if named is None else named


def check_scope(config: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for settings of a class token's SAE, a transcoder, or an attention head's SAE."""
    for name in ("cls_token_only", "cls_only", "token", "tokens", "token_type", "token_scope"):
        value = config.get(name)
        if value is True or (isinstance(value, str) and value.lower() in _CLASS_TOKEN):
            raise ValueError(f"{where}: {name}: this SAE was trained on the class token only and cannot gate patches")
    for name in ("is_transcoder", "transcode", "skip_connection"):
        if config.get(name):
            raise ValueError(f"{where}: {name}: a transcoder's decoder writes to another space and cannot gate patches")
    for name in ("hook_head_index", "hook_point_head_index"):
        if config.get(name) is not None:
            raise ValueError(f"{where}: {name}: expected null, got an SAE of one attention head's output")


def describe(
    format_name: str, weights_name: str, hook: str | None = None, layer: int | None = None, model: object = None
) -> dict[str, str]:
    """Metadata to keep with the SAE: where it comes from and, where the file says so, what it was trained on."""
    metadata = {"source_format": format_name, "source_file": weights_name}
    if hook:
        metadata["hook"] = hook
    if layer is not None:
        metadata["layer"] = str(layer)
    if isinstance(model, str) and model:
        metadata["model_name"] = model
    return metadata
