"""Names and notes that people give to features, in a JSON file beside the SAE or wherever they keep it.

{"format": "fga_fast feature notes", "version": 1, "blocks": {"9": {"17": {"name": "sleeve", "note": "..."}}}}
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from fga_fast.io.atomic import atomic_write
from fga_fast.io.json_file import read_json

FILE = "features.json"
_FORMAT, _VERSION = "fga_fast feature notes", 1
_MOST_BYTES, _MOST_NAME, _MOST_NOTE = 16 * 2**20, 200, 10_000


class Note(NamedTuple):
    """What a person says about a feature."""

    name: str  # one line
    note: str = ""


Notes: TypeAlias = dict[tuple[int, int], Note]  # (block, feature)


def beside(sae: str | os.PathLike[str]) -> Path:
    """Where the notes of an SAE are by default: in its folder."""
    path = Path(sae)
    return (path if path.is_dir() else path.parent) / FILE


def read_notes(path: str | os.PathLike[str]) -> Notes:
    """The notes in a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: not such a file, or a larger one than anybody writes.
    """
    found = read_json(Path(path), _MOST_BYTES)
    kind = found.get("format"), found.get("version")
    if kind != (_FORMAT, _VERSION):
        raise ValueError(f"notes: expected {_FORMAT!r} of version {_VERSION} in {path}, got {kind[0]!r}, {kind[1]!r}")
    notes: Notes = {}
    try:
        for block, features in found["blocks"].items():
            for feature, one in features.items():
                notes[_number(block), _number(feature)] = _checked(one.get("name"), one.get("note", ""))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"notes: {path} is damaged: {type(error).__name__}: {error}") from error
    return notes


def write_notes(path: str | os.PathLike[str], notes: Mapping[tuple[int, int], Note]) -> Path:
    """Writes a file of notes, whole or not at all.

    Raises:
        ValueError: a name that is empty, too long or of several lines.
        OSError: the folder does not take it.
    """
    blocks: dict[str, dict[str, Any]] = {}
    for (block, feature), one in sorted(notes.items()):
        blocks.setdefault(str(block), {})[str(feature)] = _checked(*one)._asdict()
    content = {"format": _FORMAT, "version": _VERSION, "blocks": blocks}
    return atomic_write(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def _number(text: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise ValueError(f"expected a number, got {text!r:.80}")
    return int(text)


def _checked(name: object, note: object) -> Note:
    for what, text, most in (("name", name, _MOST_NAME), ("note", note, _MOST_NOTE)):
        if not isinstance(text, str):
            raise TypeError(f"{what}: expected text, got {type(text).__name__}")
        if len(text) > most:
            raise ValueError(f"{what}: expected at most {most} characters, got {len(text)}")
    assert isinstance(name, str) and isinstance(note, str)
    if not name.strip() or not name.isprintable():
        raise ValueError(f"name: expected one line of text, got {name!r:.80}")
    return Note(name, note)
