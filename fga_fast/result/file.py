"""Explanations on disk: one safetensors file with all tensors, and the rest as JSON in its metadata."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from fga_fast.io.atomic import atomic_write
from fga_fast.io.json_file import parse_json
from fga_fast.io.safetensors_file import SafetensorsFile
from fga_fast.result.explanation import Explanation
from fga_fast.sae.features import TopFeatures

_FORMAT = "fga_fast.result.explanation.1"
_MAX_HEADER = 16 * 2**20  # bytes of JSON; ours has a few hundred per tensor, and the names of the classes
_OPTIONAL = ("ungated", "values", "blocks")


def write(explanation: Explanation, path: str | os.PathLike[str]) -> Path:
    """Writes the file, whole or not at all."""
    from safetensors.torch import save

    tensors = {"relevance": explanation.relevance, "logits": explanation.logits, "targets": explanation.targets}
    tensors |= {name: value for name in _OPTIONAL if (value := getattr(explanation, name)) is not None}
    tensors |= {f"scores.{layer}": value for layer, value in explanation.scores.items()}
    tensors |= {f"gates.{layer}": value for layer, value in explanation.gates.items()}
    for layer, top in explanation.features.items():
        tensors |= {f"features.{layer}.{name}": value for name, value in top._asdict().items()}
    about = {name: getattr(explanation, name) for name in ("grid", "image_size", "backend", "names", "start_layer")}
    # Cloned, since the format refuses tensors that share memory, as a batch of one and its batch do.
    whole = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    return atomic_write(path, save(whole, {"format": _FORMAT, "explanation": json.dumps(about)}))


def read(kind: type[Explanation], path: str | os.PathLike[str]) -> Explanation:
    """Reads what `write` wrote, onto the CPU, as a `kind`.

    Raises:
        FileNotFoundError, ValueError: as `Explanation.load` says.
    """
    tensors, about = _read(Path(path))
    try:
        return _assemble(kind, tensors, about)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"path: {path} is not a valid explanation: {error}") from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"path: no file {path}")
    try:
        stored = SafetensorsFile(path, _MAX_HEADER)
        if stored.metadata.get("format") != _FORMAT:
            raise ValueError(f"format {stored.metadata.get('format')!r}, not {_FORMAT!r}")
        if "explanation" not in stored.metadata:
            raise ValueError("no 'explanation' entry in its metadata")
        return stored.tensors(), parse_json(stored.metadata["explanation"], "explanation")
    except ValueError as error:
        raise ValueError(f"path: {path} is no explanation, or is damaged: {error}") from error


def _assemble(cls: type[Explanation], tensors: dict[str, Tensor], about: dict[str, Any]) -> Explanation:
    missing = [name for name in ("relevance", "logits", "targets") if name not in tensors]
    missing += [name for name in ("grid", "image_size", "backend") if name not in about]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")
    plain: dict[str, Any] = {}
    layered: dict[str, dict[int, Tensor]] = {"scores": {}, "gates": {}}
    features: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if name in ("relevance", "logits", "targets", *_OPTIONAL):
            plain[name] = tensor
        elif kind in layered:
            layered[kind][int(rest)] = tensor
        elif kind == "features":
            layer, _, entry = rest.partition(".")
            features.setdefault(int(layer), {})[entry] = tensor
        else:
            raise ValueError(f"unknown entry {name!r}")
    names = about.get("names")
    if not (names is None or isinstance(names, list)):
        raise ValueError(f"names: expected a list, got {type(names).__name__}")
    top = {layer: TopFeatures(**entries) for layer, entries in features.items()}
    return cls(
        **plain,
        scores=layered["scores"],
        gates=layered["gates"],
        features=top,
        grid=tuple(about["grid"]),
        image_size=tuple(about["image_size"]),
        backend=str(about["backend"]),
        names=None if names is None else tuple(names),
        start_layer=about.get("start_layer", 0),
    )
