"""Explanations on disk: what comes back is what was written, whole, and damaged files are refused."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from explanations import assert_same, example

from fga_fast.io.atomic import atomic_write
from fga_fast.result.explanation import Explanation


@pytest.mark.parametrize("targets", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_save_and_load(tmp_path: Path, targets: int | None, dtype: torch.dtype) -> None:
    explanation = example(2, targets, dtype=dtype)
    path = explanation.save(tmp_path / "kept.safetensors")
    assert_same(Explanation.load(path), explanation)
    assert [file.name for file in tmp_path.iterdir()] == ["kept.safetensors"]


def test_save_parts_that_share_memory(tmp_path: Path) -> None:
    explanation = example(2)
    explanation.ungated = explanation.relevance
    assert_same(Explanation.load(explanation.save(tmp_path / "shared")), explanation)
    assert_same(Explanation.load(explanation[1].save(tmp_path / "slice")), explanation[1])


def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = example(1).save(tmp_path / "kept.safetensors")
    before = path.read_bytes()

    def refuse(self: Path, target: Path) -> Path:
        raise PermissionError(13, "read-only", str(target))

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(PermissionError):
        example(2).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_keeps_the_umask(tmp_path: Path) -> None:
    plain, atomic = tmp_path / "plain", tmp_path / "atomic"
    plain.write_bytes(b"x")
    atomic_write(atomic, b"x")
    assert atomic.stat().st_mode == plain.stat().st_mode
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "no folder" / "file", b"x")


def rewrite(path: Path, change: object) -> None:
    """Applies `change` to the header of a safetensors file."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header)  # type: ignore[operator]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def rename(old: str, new: str) -> object:
    return lambda header: header.__setitem__(new, header.pop(old))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header.pop("__metadata__"), "format None"),
        (lambda header: header["__metadata__"].update(format="other"), "format 'other'"),
        (lambda header: header["__metadata__"].pop("explanation"), "no 'explanation' entry"),
        (lambda header: header["__metadata__"].update(explanation="{"), "truncated or damaged"),
        (lambda header: header["__metadata__"].update(explanation='{"grid": [3, 4]}'), "missing image_size, backend"),
        (
            lambda header: header["__metadata__"].update(
                explanation='{"grid": [3], "image_size": [24, 32], "backend": "native"}'
            ),
            "not a valid explanation",
        ),
        (
            lambda header: header["__metadata__"].update(
                explanation='{"grid": [3, 5], "image_size": [24, 32], "backend": "native"}'
            ),
            r"relevance: expected",
        ),
        (rename("targets", "aims"), "missing targets"),
        (rename("ungated", "extra"), "unknown entry 'extra'"),
        (rename("gates.2", "gates.two"), "not a valid explanation"),
        (rename("features.2.patch_index", "features.2.other"), "not a valid explanation"),
    ],
)
def test_load_checks_what_it_reads(tmp_path: Path, change: object, message: str) -> None:
    path = example().save(tmp_path / "changed.safetensors")
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        Explanation.load(path)


def test_load_refuses_damaged_files(tmp_path: Path) -> None:
    path = example().save(tmp_path / "file.safetensors")
    data = path.read_bytes()
    for cut in (0, 5, 100, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match="truncated"):
            Explanation.load(path)
    path.write_bytes(struct.pack("<Q", 2**60) + data[8:])
    with pytest.raises(ValueError, match="header of 1152921504606846976 bytes"):
        Explanation.load(path)
    path.write_bytes(pickle.dumps({"relevance": [1.0]}))
    with pytest.raises(ValueError, match="no explanation"):
        Explanation.load(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        Explanation.load(tmp_path / "none")
