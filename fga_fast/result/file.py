"""Explanations on disk: one safetensors file with all tensors, and the rest as JSON in its metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from fga_fast.io.atomic import atomic_write
from fga_fast.io.json_file import parse_json
from fga_fast.io.safetensors_file import SafetensorsFile
from fga_fast.result.fields import flat, nested

_FORMAT = "fga_fast.explanation.3"
_MAX_HEADER = 16 * 2**20  # bytes of JSON; ours has a few hundred for each tensor, and the names of the classes
_ABOUT: dict[str, Any] = {
    "grid": list, "image_size": list, "backend": str, "backend_reason": str, "names": list | None, "start_block": int,
    "notices": list, "signed": bool,
}  # fmt: skip

Result = TypeVar("Result")


def write(path: str | os.PathLike[str], fields: Mapping[str, Any]) -> Path:
    """Writes the fields of an `Explanation`, whole or not at all."""
    return atomic_write(path, to_bytes(fields))


def to_bytes(fields: Mapping[str, Any]) -> bytes:
    """The content of the file that `write` writes."""
    from safetensors.torch import save

    tensors = flat({name: fields[name] for name in fields.keys() - _ABOUT.keys()})
    # Cloned, since the format refuses tensors that share memory, as a batch of one and its batch do.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    about = json.dumps({name: fields[name] for name in _ABOUT})
    return save(tensors, {"format": _FORMAT, "explanation": about})


def read(path: str | os.PathLike[str], build: Callable[..., Result]) -> Result:
    """Reads what `write` wrote, onto the CPU, and gives the fields to `build` as keywords.

    Raises:
        FileNotFoundError, ValueError: as `Explanation.load` says.
    """
    tensors, about = _read(Path(path))
    try:
        result = build(**nested(tensors), **_checked(about))
        targets, classes = tensors["targets"], tensors["logits"].shape[1]
        if targets.numel() and not -1 <= int(targets.min()) <= int(targets.max()) < classes:
            raise ValueError(f"targets: expected -1 to {classes - 1}, got {targets.flatten().tolist()!r:.80}")
        return result
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"path: {path} is not a valid explanation: {error}") from error


def _read(path: Path) -> tuple[dict[str, Tensor], Any]:
    if not path.is_file():
        raise FileNotFoundError(f"path: no file {path}")
    try:
        stored = SafetensorsFile(path, _MAX_HEADER)
        found = stored.metadata.get("format")
        if found != _FORMAT:
            raise ValueError(
                f"format {found!r}, expected {_FORMAT!r}; if another version of fga_fast wrote it, explain the images "
                "again and save the result"
            )
        return stored.tensors(), parse_json(stored.metadata.get("explanation", "null"), "explanation")
    except ValueError as error:
        raise ValueError(f"path: {path} is no explanation, or is damaged: {error}") from error


def _checked(about: Any) -> dict[str, Any]:
    """The fields that are not tensors, of the types that `Explanation` wants."""
    if not isinstance(about, dict) or about.keys() != _ABOUT.keys():
        raise ValueError(f"metadata: expected the entries {', '.join(_ABOUT)}, got {about!r:.80}")
    for name, kind in _ABOUT.items():
        if not isinstance(about[name], kind):
            raise ValueError(f"{name}: expected {getattr(kind, '__name__', kind)}, got {about[name]!r:.80}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in about.items()}
