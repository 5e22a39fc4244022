"""Writing packages: whole or not at all, and what cannot be exported is said before anything is compiled.

Nothing is compiled here; test_package.py does.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from packages import explainer, images

from fga_fast import Explainer
from fga_fast.io.images import Preprocess


@pytest.mark.parametrize("where", ["compiler", "move"])
def test_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def compiled(_: object, package_path: str) -> None:
        Path(package_path).write_bytes(b"new")
        if where == "compiler":
            raise RuntimeError("stopped")

    def replace(self: Path, target: Path) -> Path:
        if where == "move" and (self.suffix, Path(target).name) == (".json", "x.json"):
            raise RuntimeError("stopped")
        return original(self, target)

    original = Path.replace
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiled)
    monkeypatch.setattr(Path, "replace", replace)
    path, small = tmp_path / "x.pt2", explainer()
    for before in ({}, {"x.pt2": b"old", "x.json": b"old too"}):
        for name, content in before.items():
            (tmp_path / name).write_bytes(content)
        with pytest.raises(RuntimeError, match="stopped"):
            small.export(path, images(1))
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_cannot_be_exported_is_said_before_compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiling(*_: object, **__: object) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiling)
    two, path = images(2), tmp_path / "x.pt2"
    write: Any = explainer().export
    cases: list[tuple[type[Exception], str, Any]] = [
        (ValueError, r"path: expected the name of a file ending in \.pt2", lambda: write(tmp_path / "x", two)),
        (ValueError, "target_mode: expected", lambda: write(path, two, target_mode="all")),
        (ValueError, "example: expected images", lambda: write(path, two[0])),
        (ValueError, "class_names: expected 5 names", lambda: write(path, two, class_names=["a"])),
        (ValueError, "makes images", lambda: write(path, two, preprocessing=Preprocess((8, 8)))),
        (TypeError, "preprocessing: expected a Preprocess, got dict", lambda: write(path, two, preprocessing={})),
        (ValueError, "backend", lambda: explainer(backend="reference").export(path, two)),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder\.json is a folder"):
        write(tmp_path / "folder.pt2", two)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="cannot write into the folder"):
        write(tmp_path / "file" / "x.pt2", two)
    assert {p.name for p in tmp_path.iterdir()} == {"folder.json", "file"}


def test_without_an_example_the_size_has_to_be_known(tmp_path: Path) -> None:
    known = explainer()
    asked = Explainer(known.model, layout=dataclasses.replace(known.layout, image_size=None), preset="published")
    with pytest.raises(ValueError, match="example: the model does not say what size of images it takes"):
        asked.export(tmp_path / "x.pt2")
