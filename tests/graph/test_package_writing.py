"""Writing packages: whole or not at all, weights once, and what cannot be exported is said before anything is compiled.

Nothing is compiled here; test_package.py does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from packages import explainer, images

from fga_fast import Explainer
from fga_fast.graph.package import export as module
from fga_fast.io.images import Preprocess


def test_weights_are_in_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []

    def weigh(program: torch.export.ExportedProgram, package_path: str) -> None:
        tensors = {**program.state_dict, **program.constants}.values()
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        found.append(sum(storages.values()))
        raise RuntimeError("no compiler today")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", weigh)
    small = explainer()
    with pytest.raises(RuntimeError, match="no compiler today"):
        small.export(tmp_path / "x.pt2", images(2))
    weights = sum(p.nbytes for p in small.model.parameters())
    saes = sum(b.nbytes for one in small.saes.values() for b in one.buffers())
    assert found[0] <= 1.05 * (weights + saes)


@pytest.mark.parametrize("where", ["compiler", "hash", "metadata", "move"])
def test_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def compiled(_: object, package_path: str) -> None:
        Path(package_path).write_bytes(b"new")
        if where == "compiler":
            raise RuntimeError("stopped")

    def stop(*_: object) -> None:
        raise RuntimeError("stopped")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiled)
    if where == "hash":
        monkeypatch.setattr(module, "sha256_of", stop)
    elif where == "metadata":
        monkeypatch.setattr(module, "this_machine", stop)
    elif where == "move":
        original = Path.replace

        def replace(self: Path, target: Path) -> Path:
            if Path(target).name == "x.json" and self.suffix == ".json":
                raise RuntimeError("stopped")
            return original(self, target)

        monkeypatch.setattr(Path, "replace", replace)
    path = tmp_path / "x.pt2"
    if where != "move":
        with pytest.raises(RuntimeError, match="stopped"):
            explainer().export(path, images(1))
        assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"old")
    path.with_suffix(".json").write_bytes(b"old too")
    with pytest.raises(RuntimeError, match="stopped"):
        explainer().export(path, images(1))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"x.pt2": b"old", "x.json": b"old too"}
    monkeypatch.undo()


def test_existing_package_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(_: object, package_path: str) -> None:
        assert path.read_bytes() == b"old"  # until the new one is complete
        Path(package_path).write_bytes(b"new")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiled)
    path = tmp_path / "x.pt2"
    path.write_bytes(b"old")
    path.with_suffix(".json").write_bytes(b"old too")
    assert explainer().export(path, images(1)) == path
    assert path.read_bytes() == b"new"
    assert json.loads(path.with_suffix(".json").read_text())["sha256"] == hashlib.sha256(b"new").hexdigest()
    assert {p.name for p in tmp_path.iterdir()} == {"x.pt2", "x.json"}


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
    asked = Explainer(known.model, layout=dataclasses.replace(known.layout, image_size=None))
    with pytest.raises(ValueError, match="example: the model does not say what size of images it takes"):
        asked.export(tmp_path / "x.pt2")
