"""`fga-fast export` and `fga-fast explain --package`, from end to end with the shipped demo model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packages import PREPROCESS, explainer, images
from PIL import Image

from fga_fast import Explanation, load_package
from fga_fast.assets import fashion_scenes
from fga_fast.cli.main import main

pytest.importorskip("timm")

Refused = Callable[..., str]
FILES = {"figure.png", "explanation.json", "relevance.safetensors"}


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "demo.pt2"
    assert main(["export", "demo", str(path), "--batch", "2", "--target-mode", "given", "--signed"]) == 0
    return path


@pytest.mark.slow
def test_package_of_the_demo_writes_what_the_demo_does(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene, facts, kept = fashion_scenes()[0], [], []
    for way, given in (("model", ["--signed"]), ("package", ["--package", str(demo)])):
        out = tmp_path / way
        assert main(["explain", str(scene), *given, "--target", "trouser", "--out", str(out)]) == 0
        assert f"\n{scene.name}\n  Trouser (class 1): logit " in capsys.readouterr().out
        assert {path.name for path in out.iterdir()} == FILES
        assert Image.open(out / "figure.png").width > 300
        facts.append(json.loads((out / "explanation.json").read_text()))
        kept.append(Explanation.load(out / "relevance.safetensors"))
    by_model, by_package = facts
    assert by_model.keys() == by_package.keys()
    for name in ("image", "image_size", "grid", "gated_blocks", "gate_base"):
        assert by_model[name] == by_package[name]
    assert by_package["model"] == "the package demo.pt2"
    assert by_package["milliseconds"] > 0 and by_package["milliseconds_forward_pass"] is None
    (row,), (other,) = by_model["explained"], by_package["explained"]
    assert row.keys() == other.keys() and row["top_features"].keys() == other["top_features"].keys()
    assert (row["target"], row["name"]) == (other["target"], other["name"]) == (1, "Trouser")
    assert row["strongest_patch"] == other["strongest_patch"]
    assert other["logit"] == pytest.approx(row["logit"], rel=1e-4)
    assert other["probability"] is None  # a package does not say whether it is a sigmoid or a softmax
    assert kept[0].names == kept[1].names
    for name in ("targets", "logits", "values", "relevance", "scores", "gates"):
        torch.testing.assert_close(getattr(kept[1], name), getattr(kept[0], name), rtol=1e-4, atol=1e-6)
    about = load_package(demo).metadata
    assert (about.batch, about.target_mode, about.signed, about.gate["base"]) == (2, "given", True, 2.0)
    assert sorted(path.name for path in demo.parent.iterdir()) == ["demo.json", "demo.pt2"]


@pytest.mark.slow
def test_folder_with_a_broken_image(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("a.png", "c.png", "d.png"):
        (folder / name).write_bytes(fashion_scenes()[1].read_bytes())
    (folder / "b.png").write_bytes(b"nothing")
    assert main(["explain", str(folder), "--package", str(demo), "--out", str(out)]) == 1
    assert {path.name for path in out.iterdir()} == {"a.png", "c.png", "d.png", "contact_sheet.png"}
    assert {path.name for path in (out / "d.png").iterdir()} == FILES
    assert "left out b.png" in capsys.readouterr().err


@pytest.mark.slow
def test_refusals_of_a_package(demo: Path, tmp_path: Path, refused: Refused) -> None:
    given = ["explain", fashion_scenes()[0], "--package", demo, "--out", tmp_path]
    for more, message in (
        (["--target", "1", "2"], "explains one class an image, got 1 2; give one"),
        (
            ["--target", "unicorn"],
            "--target: 'unicorn' is not among the names of the 9 classes; they are 'T-s",
        ),
        (["--target", "9"], "--target: expected a class from 0 to 8, got 9"),
        (
            ["--target", "1", "--signed", "--batch-size", "3", "--random-weights"],
            "--random-weights, --signed, --batch-size: the package has its own",
        ),
    ):
        assert message in refused(*given, *more)
    assert "IMAGE: expected" in refused("explain", "--package", demo, "--out", tmp_path)
    assert "no file" in refused(*given[:2], "--package", tmp_path / "gone.pt2", "--out", tmp_path)
    assert list(tmp_path.iterdir()) == []


def uncompiled(_: object, package_path: str) -> None:
    Path(package_path).write_bytes(b"not compiled")


def test_packages_that_take_no_files_or_no_targets(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fga_fast.graph.package import load

    monkeypatch.setattr(load, "_loader", lambda *_: None)
    path = tmp_path / "x.pt2"
    given = ["explain", fashion_scenes()[0], "--package", path, "--target", "1", "--out", tmp_path / "out"]
    for preprocessing, message in (
        (None, "was exported without preprocessing, so it takes no image files"),
        (PREPROCESS, "explains the predicted class only, got 1; leave it out"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(torch._inductor, "aoti_compile_and_package", uncompiled)
            explainer().export(path, images(1), preprocessing=preprocessing)
        assert message in refused(*given)


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
        (["demo", "x.pt2", "--start-block", "9"], "start_block: expected 0 to 4"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, given: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused("export", *given)
    assert list(tmp_path.iterdir()) == []


def test_export_passes_settings_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", uncompiled)
    path = tmp_path / "vit.pt2"
    given = ["--random-weights", "--dtype", "bfloat16", "--batch", "3", "--method", "input_x_gradient"]
    assert main(["export", "test_vit", str(path), *given, "--start-block", "1"]) == 0
    assert f"wrote {path}" in capsys.readouterr().out
    told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert (told["dtype"], told["batch"], told["method"], told["start_block"]) == (
        "bfloat16", 3, "input_x_gradient", 1
    )  # fmt: skip
    assert told["preprocessing"]["image_size"] == [160, 160] and len(told["class_names"]) == 1000
