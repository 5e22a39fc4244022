"""JSON from a file that is not trusted: of bounded size, and one object of what the standard calls JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_bounded(path: Path, limit: int) -> bytes:
    """The content of a file of at most ``limit`` bytes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a larger file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"{path}: expected a file of at most {limit} bytes, got {size}")
    return path.read_bytes()


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a file of at most ``limit`` bytes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a larger file, not UTF-8, not JSON, or not an object.
    """
    return parse_json(read_bounded(path, limit), str(path))


def parse_json(data: bytes | str, where: str) -> dict[str, Any]:
    """The JSON object in ``data``; raises ValueError, naming ``where``, for anything else."""
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: truncated or damaged: not valid JSON ({type(error).__name__}: {error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
