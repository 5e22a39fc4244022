"""The tensors of an explanation by flat names, as files and graphs have them: "relevance", "gates.9" and so on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fga_fast.sae.features import TopFeatures

_PLAIN = ("relevance", "signal", "logits", "targets", "ungated", "ungated_signal", "values", "blocks")


def flat(fields: Mapping[Any, Any], prefix: str = "") -> dict[str, Tensor]:
    """Tensors of `Explanation` fields, also nested ones, by names such as "gates.9" or "features.9.patch_index"."""
    found: dict[str, Tensor] = {}
    for name, value in fields.items():
        if isinstance(value, Tensor):
            found[f"{prefix}{name}"] = value
        elif value is not None:
            found |= flat(value._asdict() if isinstance(value, TopFeatures) else value, f"{prefix}{name}.")
    return found


def nested(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The opposite of `flat`.

    Raises:
        TypeError, ValueError: names that `flat` does not give.
    """
    fields: dict[str, Any] = {"scores": {}, "gates": {}, "features": {}}
    for name, tensor in tensors.items():
        match name.split("."):
            case [plain] if plain in _PLAIN:
                fields[plain] = tensor
            case ["scores" | "gates" as kind, block]:
                fields[kind][_block(block)] = tensor
            case ["features", block, part]:
                fields["features"].setdefault(_block(block), {})[part] = tensor
            case _:
                raise ValueError(f"unknown entry {name!r}")
    fields["features"] = {block: TopFeatures(**parts) for block, parts in fields["features"].items()}
    return fields


def _block(text: str) -> int:
    if not text.isdecimal() or text != str(int(text)):  # one block must not have two names
        raise ValueError(f"expected the number of a block, got {text!r}")
    return int(text)
