"""Explanations on disk: what comes back is what was written, whole, and damaged files are refused."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from explanations import assert_same, example, full

from fga_fast.io.atomic import atomic_write
from fga_fast.result.explanation import Explanation


@pytest.mark.parametrize("targets", (None, 1, 3))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_what_is_saved_comes_back(tmp_path: Path, targets: int | None, dtype: torch.dtype) -> None:
    for batch in (0, 2):
        for explanation in (example(batch, targets, dtype=dtype), full(batch, targets)):
            path = explanation.save(tmp_path / "kept.safetensors")
            assert_same(Explanation.load(path), explanation)
    assert [file.name for file in tmp_path.iterdir()] == ["kept.safetensors"]


def test_save_parts_that_share_memory(tmp_path: Path) -> None:
    explanation = example(2)
    shared = replace(explanation, ungated=explanation.relevance)
    for part in (shared, shared[1]):
        assert_same(Explanation.load(part.save(tmp_path / "file")), part)


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


def metadata(**change: object) -> Callable[[dict[str, Any]], object]:
    return lambda header: header["__metadata__"].update(change)


def about(**change: object) -> Callable[[dict[str, Any]], object]:
    def apply(header: dict[str, Any]) -> None:
        entries = json.loads(header["__metadata__"]["explanation"]) | change
        kept = {name: value for name, value in entries.items() if value is not ...}
        header["__metadata__"]["explanation"] = json.dumps(kept)

    return apply


def rename(old: str, new: str) -> Callable[[dict[str, Any]], object]:
    return lambda header: header.__setitem__(new, header.pop(old))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header.pop("__metadata__"), "format None"),
        (metadata(format="fga_fast.explanation.1"), "'fga_fast.explanation.1', .* explain the images again"),
        (lambda header: header["__metadata__"].pop("explanation"), "explanation: expected a JSON object"),
        (metadata(explanation="{"), "truncated or damaged"),
        (metadata(explanation="[" * 100_000), "truncated or damaged"),
        (about(backend_reason=...), "expected the entries grid, .*backend_reason, .* got"),
        (about(ungated=None), "expected the entries grid, "),
        (about(grid=[3]), "not a valid explanation"),
        (about(grid=[float("inf"), 4]), "Infinity is not JSON"),
        (about(grid=[3, 5]), "relevance: expected"),
        (about(grid=[-3, -4]), "grid: expected two whole numbers of at least 1"),
        (about(image_size=[0, 9]), "image_size: expected two whole numbers of at least 1"),
        (rename("gates.2", "gates.02"), "expected the number of a block, got '02'"),
        (about(names="cat"), "names: expected list .*got 'cat'"),
        (about(names={"0": "cat"}), "names: expected list"),
        (about(names=["cat"]), "names: expected 7 str"),
        (about(names=[1] * 7), "names: expected 7 str"),
        (about(start_block=-1), "start_block: expected a block"),
        (about(start_block="2"), "start_block: expected int"),
        (rename("targets", "aims"), "unknown entry 'aims'"),
        (rename("relevance", "scores.9"), "missing .*'relevance'"),
        (rename("gates.2", "gates"), "unknown entry 'gates'"),
        (rename("gates.2", "gates.two"), "not a valid explanation"),
        (rename("features.2.patch_index", "features.2.other"), "not a valid explanation"),
    ],
)
def test_load_checks_what_it_reads(tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    path = full().save(tmp_path / "changed.safetensors")
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
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
