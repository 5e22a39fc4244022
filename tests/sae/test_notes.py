"""Names of features in their file: kept whole, read with care."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fga_fast.sae.notes import Note, beside, read_notes, write_notes

NOTES = {(9, 17): Note("sleeve", "at the cuff\n<b>"), (2, 3): Note("Häkchen ✓")}


def test_there_and_back(tmp_path: Path) -> None:
    path = write_notes(tmp_path / "features.json", NOTES)
    assert read_notes(path) == NOTES and [*tmp_path.iterdir()] == [path]
    assert "Häkchen ✓" in path.read_text(encoding="utf-8")
    assert beside(tmp_path) == beside(tmp_path / "sae.safetensors") == path


def test_a_name_that_is_none_leaves_the_file_alone(tmp_path: Path) -> None:
    path = write_notes(tmp_path / "features.json", NOTES)
    for name in ("", "  ", "two\nlines", "x" * 201, "\ud800"):
        with pytest.raises(ValueError, match="name: expected"):
            write_notes(path, {(1, 1): Note(name)})
    with pytest.raises(ValueError, match="note: expected at most 10000 characters, got 10001"):
        write_notes(path, {(1, 1): Note("a", "x" * 10_001)})
    assert read_notes(path) == NOTES and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    ("change", "words"),
    (
        ({"format": "other"}, "expected 'fga_fast feature notes' of version 1 in .* got 'other', 1"),
        ({"version": 2}, "got 'fga_fast feature notes', 2"),
        ({"blocks": []}, "is damaged: AttributeError"),
        ({"blocks": {"a": {"1": {"name": "x"}}}}, "is damaged: ValueError: expected a number, got 'a'"),
        ({"blocks": {"1": {"-1": {"name": "x"}}}}, "is damaged: ValueError: expected a number, got '-1'"),
        ({"blocks": {"1": {"1": {"name": 3}}}}, "is damaged: TypeError: name: expected text, got int"),
        ({"blocks": {"1": {"1": {}}}}, "is damaged: TypeError: name: expected text, got NoneType"),
        ({"blocks": {"1": {"1": "x"}}}, "is damaged: AttributeError"),
        ({"blocks": {"1": {"1": {"name": "x", "note": []}}}}, "is damaged: TypeError: note: expected text, got list"),
    ),
)
def test_damaged(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "features.json"
    path.write_text(json.dumps({"format": "fga_fast feature notes", "version": 1, "blocks": {}} | change))
    with pytest.raises(ValueError, match=words):
        read_notes(path)


def test_no_file_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_notes(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"format": ')
    with pytest.raises(ValueError, match="truncated or damaged"):
        read_notes(tmp_path / "cut.json")
