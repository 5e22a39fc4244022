"""The folder of a harvest: what it holds, and what makes it complete.

    manifest.json               what everything depends on; once complete, also all shards with checksums, and errors
    shards/000000.safetensors   tensors block_<l> [n, T, C] of n images, T = stored prefix tokens + patches
    shards/000000.json          the same shard's images in order, and what could not be read; written after the tensors

A shard is whole once its JSON is there, a harvest once manifest.json says "complete". Every file is written whole or
not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fga_fast.io.json_file import read_json

MANIFEST, SHARDS = "manifest.json", "shards"
FORMAT, VERSION = "fga_fast harvest", 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MOST_JSON = 256 * 2**20  # bytes; an error takes about 200, a shard 150


@dataclass(frozen=True)
class Shard:
    """One file of tensors."""

    file: str
    images: int  # n
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Listed:
    """What is known of a shard's images, in the order of its rows, and what could not be read."""

    keys: Sequence[str] = ()
    paths: Sequence[str | None] = ()
    targets: Sequence[int | None] = ()
    predicted: Sequence[int] = ()  # -1: the model has no classes
    errors: Sequence[tuple[str, str]] = ()  # key and reason


def tensors_file(number: int) -> str:
    """Where a shard's tensors are in the folder."""
    return f"{SHARDS}/{number:06}.safetensors"


def list_file(number: int) -> str:
    """Where a shard's list of images is in the folder."""
    return f"{SHARDS}/{number:06}.json"


def tensor_name(block: int) -> str:
    """A block's name in a shard."""
    return f"block_{block}"


def to_json(value: Mapping[str, Any]) -> bytes:
    """The same bytes for the same value."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def listed_to_json(shard: Shard, listed: Listed) -> bytes:
    """The content of a shard's JSON."""
    return to_json({"shard": asdict(shard), **asdict(listed)})


def read_listed(folder: Path, number: int) -> tuple[Shard, Listed]:
    """A shard's JSON.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    path = folder / list_file(number)
    found = read_json(path, _MOST_JSON)
    try:
        shard = shard_of(found["shard"], number)
        listed = Listed(
            keys=[str(key) for key in found["keys"]],
            paths=[None if one is None else str(one) for one in found["paths"]],
            targets=[None if one is None else int(one) for one in found["targets"]],
            predicted=[int(one) for one in found["predicted"]],
            errors=[(str(key), str(reason)) for key, reason in found["errors"]],
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: damaged: {type(error).__name__}: {error}") from error
    lengths = {len(one) for one in (listed.keys, listed.paths, listed.targets, listed.predicted)}
    if lengths != {shard.images}:
        raise ValueError(f"{path}: damaged: expected {shard.images} images in every list, got {sorted(lengths)}")
    return shard, listed


def shard_of(found: Mapping[str, Any], number: int) -> Shard:
    """A shard from JSON; ValueError if it is not the one of this number, or its sizes are none."""
    shard = Shard(str(found["file"]), int(found["images"]), int(found["bytes"]), str(found["sha256"]))
    if shard.file != tensors_file(number) or min(shard.images, shard.bytes) < 0:
        raise ValueError(f"expected {tensors_file(number)} as shard {number}, got {shard}")
    return shard


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of a harvest, complete or not.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of another kind or version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"harvest: no {MANIFEST} in {folder}; expected a folder that harvest() wrote")
    found = read_json(path, _MOST_JSON)
    kind = found.get("format"), found.get("version")
    if kind != (FORMAT, VERSION):
        raise ValueError(f"{path}: expected {FORMAT!r} of version {VERSION}, got {kind[0]!r} of version {kind[1]!r}")
    if not isinstance(found.get("settings"), dict):
        raise ValueError(f"{path}: damaged: expected settings by name")
    return found
