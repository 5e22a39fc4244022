"""`fga-fast export` and `fga-fast explain --package`, from end to end with the shipped demo model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from packages import explainer, images
from PIL import Image

from fga_fast import Explanation, load_package
from fga_fast.assets import fashion_scenes
from fga_fast.cli.main import main

pytest.importorskip("timm")


def refused(capsys: pytest.CaptureFixture[str], *given: object) -> str:
    """Runs a command that has to end with exit code 2 and one message, and returns that message."""
    assert main([*map(str, given)]) == 2
    text = capsys.readouterr().err
    assert text.startswith("fga-fast: error: ")
    return text


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "demo.pt2"
    assert main(["export", "demo", str(path), "--batch", "2", "--targets", "given", "--signed"]) == 0
    return path


@pytest.mark.slow
def test_package_of_the_demo(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene, name = fashion_scenes()[0], "Trouser"
    assert main(["explain", str(scene), "--package", str(demo), "--target", name, "--out", str(tmp_path / "a")]) == 0
    assert f"{scene.name}: {name} (class 1): logit" in capsys.readouterr().out
    assert main(["explain", str(scene), "--target", name, "--signed", "--out", str(tmp_path / "b")]) == 0
    found, expected = (Explanation.load(tmp_path / way / "relevance.safetensors") for way in "ab")
    assert found.targets.tolist() == expected.targets.tolist() == [1]
    torch.testing.assert_close(found.relevance, expected.relevance, rtol=1e-4, atol=1e-6)
    assert Image.open(tmp_path / "a" / "overlay.png").size == (56, 56)
    about = load_package(demo).metadata
    assert (about.batch, about.targets, about.signed, about.gate["base"]) == (2, "given", True, 2.0)
    assert sorted(path.name for path in demo.parent.iterdir()) == ["demo.json", "demo.pt2"]


@pytest.mark.slow
def test_folder_with_a_broken_image(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("a.png", "c.png", "d.png"):
        (folder / name).write_bytes(fashion_scenes()[1].read_bytes())
    (folder / "b.png").write_bytes(b"nothing")
    assert main(["explain", str(folder), "--package", str(demo), "--target", "pullover", "--out", str(out)]) == 1
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "c.png", "d.png"]
    assert {path.name for path in (out / "d.png").iterdir()} == {"overlay.png", "relevance.safetensors"}
    assert "left out b.png" in capsys.readouterr().err


@pytest.mark.slow
def test_refusals_of_a_package(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["explain", fashion_scenes()[0], "--package", demo, "--out", tmp_path]
    assert "this package explains given classes" in refused(capsys, *given)
    assert "expected one class with --package, got 2" in refused(capsys, *given, "--target", "1", "2")
    assert "no class of the package is called 'unicorn'" in refused(capsys, *given, "--target", "unicorn")
    text = refused(capsys, *given, "--target", "1", "--signed", "--batch-size", "3", "--random-weights")
    assert "--random-weights, --signed, --batch-size: the package has its own" in text
    assert "IMAGE: expected" in refused(capsys, "explain", "--package", demo, "--out", tmp_path)
    assert "no file" in refused(capsys, *given[:2], "--package", tmp_path / "gone.pt2", "--out", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_package_without_preprocessing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fga_fast.graph.package import export, load

    path = tmp_path / "x.pt2"
    with monkeypatch.context() as patch:
        patch.setattr(torch._inductor, "aoti_compile_and_package", lambda _, package_path: path_of(package_path))
        export.export(explainer(), path, images(1))
    monkeypatch.setattr(load, "_loader", lambda *_: None)
    text = refused(capsys, "explain", fashion_scenes()[0], "--package", path, "--out", tmp_path / "out")
    assert "was exported without preprocessing, so it takes no image files" in text


def path_of(package_path: str) -> None:
    Path(package_path).write_bytes(b"not compiled")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["demo", "x.bin"], "path: expected the name of a file ending in .pt2, got x.bin"),
        (["demo", "x.pt2", "--batch", "0"], "--batch: expected at least 1, got 0"),
        (["demo", "x.pt2", "--checkpoint", "w.pt"], "--checkpoint: expected"),
        (["no_such_vit", "x.pt2", "--random-weights"], "timm has no model 'no_such_vit'"),
        (["test_vit", "x.pt2"], "no weights for test_vit"),
        (["demo", "x.pt2", "--backend", "reference"], "backend: 'reference' is not compiled"),
        (["demo", "x.pt2", "--sae", "2=gone"], "--sae: no file or folder gone"),
        (["demo", "x.pt2", "--start-layer", "9"], "start_layer: expected 0 to 4"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, given: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, "export", *given)
    assert list(tmp_path.iterdir()) == []


def test_export_passes_settings_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda _, package_path: path_of(package_path))
    path = tmp_path / "vit.pt2"
    given = ["--random-weights", "--dtype", "bfloat16", "--batch", "3", "--method", "input_x_gradient"]
    assert main(["export", "test_vit", str(path), *given, "--start-layer", "1"]) == 0
    assert f"wrote {path}" in capsys.readouterr().out
    told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert (told["dtype"], told["batch"], told["method"], told["start_layer"]) == (
        "bfloat16", 3, "input_x_gradient", 1
    )  # fmt: skip
    assert told["preprocessing"]["image_size"] == [160, 160] and len(told["class_names"]) == 1000
