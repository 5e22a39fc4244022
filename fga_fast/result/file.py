"""Explanations on disk: one safetensors file with all tensors, and the rest as JSON in its metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from fga_fast.io.atomic import atomic_write
from fga_fast.sae.features import TopFeatures

_FORMAT = "fga_fast.explanation.2"
_MAX_HEADER = 16 * 2**20  # bytes of JSON; ours has a few hundred for each tensor, and the names of the classes
_TENSORS = ("relevance", "logits", "targets", "ungated", "values", "blocks")
_ABOUT: dict[str, Any] = {
    "grid": list, "image_size": list, "backend": str, "backend_reason": str, "names": list | None, "start_layer": int,
}  # fmt: skip

Result = TypeVar("Result")


def write(path: str | os.PathLike[str], fields: Mapping[str, Any]) -> Path:
    """Writes the fields of an `Explanation`, whole or not at all."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    for name in fields.keys() - _ABOUT.keys():
        tensors |= _flat(name, fields[name])
    about = json.dumps({name: fields[name] for name in _ABOUT})
    return atomic_write(path, save(tensors, {"format": _FORMAT, "explanation": about}))


def _flat(name: str, value: Any) -> dict[str, Tensor]:
    """A field's tensors by names such as "relevance", "gates.9", "features.9.patch_index"."""
    if isinstance(value, Tensor):
        # Cloned, since the format refuses tensors that share memory, as a batch of one and its batch do.
        return {name: value.detach().cpu().contiguous().clone()}
    if value is None:
        return {}
    parts = value._asdict() if isinstance(value, TopFeatures) else value
    return {full: tensor for key, part in parts.items() for full, tensor in _flat(f"{name}.{key}", part).items()}


def read(path: str | os.PathLike[str], build: Callable[..., Result]) -> Result:
    """Reads what `write` wrote, onto the CPU, and gives the fields to `build` as keywords.

    Raises:
        FileNotFoundError, ValueError: as `Explanation.load` says.
    """
    tensors, about = _read(Path(path))
    try:
        return build(**_fields(tensors), **_checked(about))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"path: {path} is not a valid explanation: {error}") from error


def _read(path: Path) -> tuple[dict[str, Tensor], Any]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"path: no file {path}")
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > min(_MAX_HEADER, path.stat().st_size - 8):
        raise ValueError(f"path: {path} is truncated or no explanation: it announces a header of {header} bytes")
    try:
        with safe_open(path, framework="pt", device="cpu") as stored:
            metadata = stored.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(
                    f"path: {path} has the format {metadata.get('format')!r}, expected {_FORMAT!r}; if another version "
                    "of fga_fast wrote it, explain the images again and save the result"
                )
            about = json.loads(metadata.get("explanation", "null"))
            return {name: stored.get_tensor(name) for name in stored.keys()}, about  # noqa: SIM118 (not a mapping)
    except (SafetensorError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"path: {path} is truncated or damaged: {error}") from error


def _fields(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Undoes `_flat`."""
    fields: dict[str, Any] = {"scores": {}, "gates": {}, "features": {}}
    for name, tensor in tensors.items():
        match name.split("."):
            case [plain] if plain in _TENSORS:
                fields[plain] = tensor
            case ["scores" | "gates" as kind, layer]:
                fields[kind][int(layer)] = tensor
            case ["features", layer, part]:
                fields["features"].setdefault(int(layer), {})[part] = tensor
            case _:
                raise ValueError(f"unknown entry {name!r}")
    fields["features"] = {layer: TopFeatures(**parts) for layer, parts in fields["features"].items()}
    return fields


def _checked(about: Any) -> dict[str, Any]:
    """The fields that are not tensors, of the types that `Explanation` wants."""
    if not isinstance(about, dict) or about.keys() != _ABOUT.keys():
        raise ValueError(f"metadata: expected the entries {', '.join(_ABOUT)}, got {about!r:.80}")
    for name, kind in _ABOUT.items():
        if not isinstance(about[name], kind):
            raise ValueError(f"{name}: expected {getattr(kind, '__name__', kind)}, got {about[name]!r:.80}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in about.items()}
