"""`fga-fast harvest` from end to end: the shipped model, a timm model, every source of images, and its messages."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from harvesting import picture

from fga_fast import Preprocess
from fga_fast.assets import fashion_model, fashion_scenes
from fga_fast.cli.main import main
from fga_fast.harvest.activations import Activations

pytest.importorskip("timm")
TEST_VIT = ("--model", "test_vit", "--random-weights")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["harvest", "--blocks", "2", "3", "--out", "out", "--class-token", "--batch-size", "3"]) == 0
    said = capsys.readouterr()
    assert "streams  6 images, blocks 2, 3, 64 patches and 1 in front, width 128, float32" in said.out
    assert "0.4 MB in 1 shard(s) into out" in said.out and "harvesting 0.4 MB" in said.err and "image/s" in said.err
    found = Activations("out")
    assert sorted(found.keys) == [path.name for path in fashion_scenes()] and found.about.blocks == (2, 3)
    assert found.about.model == "the fashion demo model"
    found.check_model(fashion_model())
    assert main(["harvest", "--blocks", "2", "3", "--out", "out", "--class-token", "--batch-size", "3"]) == 0


def test_a_folder_a_bad_image_and_a_half(capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos").mkdir()
    for number in range(8):
        picture(number).save(Path("photos", f"{number}.png"))
    Path("photos", "bad.png").write_bytes(b"no picture")
    given = ["harvest", "photos", "--blocks", "1", "--dtype", "bfloat16"]
    assert main([*given, "--out", "all"]) == 1
    said = capsys.readouterr()
    assert "fga-fast: bad.png: ImageFileError: " in said.err and "8 images, block 1, 64 patches, width" in said.out
    for half in ("report", "tune"):
        main([*given, "--split", half, "--out", half])
    halves = [{*Activations(half).keys} for half in ("report", "tune")]
    assert not halves[0] & halves[1] and len(halves[0] | halves[1]) == 8
    assert main(["harvest", "--blocks", "1", "--out", "two", "--limit", "2", "photos"]) == 0
    assert len(Activations("two")) == 2


def test_a_manifest_and_a_timm_model() -> None:
    picture(0).save("a.png")
    Path("list.csv").write_text("image,target\na.png,3\n", encoding="utf-8")
    assert main(["harvest", "--manifest", "list.csv", *TEST_VIT, "--blocks", "5", "--out", "out"]) == 0
    found = Activations("out")
    assert (found.keys, found.targets, found.about.grid) == (["a.png"], [3], (10, 10))
    assert found.about.model == "test_vit" and found.about.preprocess is not None
    assert found.read(5, 0, 1).shape == (1, 100, 64)


def test_a_hugging_face_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    class Data(list[dict[str, Any]]):
        features: ClassVar = {"image": object()}

    fake = ModuleType("datasets")
    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, split: str) -> Data:
        asked.append((name, split))
        return Data({"image": one} for one in (picture(0), 3, picture(1)))

    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert main(["harvest", "--dataset", "me/pets:train", "--blocks", "0", "--out", "out"]) == 1
    found = Activations("out")
    assert asked == [("me/pets", "train")] and sorted(found.keys) == ["train/0", "train/2"]
    assert found.about.errors == (("train/1", "ValueError: dataset: row 2, column image: expected a picture, got int"),)


def test_the_page() -> None:
    """The examples of docs/harvest.md, as printed, and what it says about disk space."""
    page = (Path(__file__).parents[2] / "docs" / "harvest.md").read_text(encoding="utf-8")
    first, second = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    Path("photos").mkdir()
    for number in range(70):
        picture(number).save(Path("photos", f"{number}.png"))
    names: dict[str, Any] = {"model": fashion_model(), "preprocess": Preprocess((56, 56))}
    exec(compile(first + second, "docs/harvest.md", "exec"), names)
    assert names["x"].shape == (2, 64, 128) and names["batch"][3].shape == (4096, 128)
    assert len(names["names"]) == len(names["classes"]) == 70
    assert next(names["tokens"].batches(1))[1].shape == (16 * 64, 128)
    size = sum(shard.bytes for shard in names["activations"].shards)
    assert size == pytest.approx(2 * 70 * 64 * 128 * 2, rel=1e-3)
    assert "that is 0.6 MB" in page and round(4 * 196 * 768 / 1e6, 1) == 0.6


def test_messages(capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*given: str) -> str:
        assert main(["harvest", *given]) == 2
        return capsys.readouterr().err

    assert "got [99]" in refused("--blocks", "99", "--out", "out")
    assert "with --model, got none; IMAGES comes first" in refused(*TEST_VIT, "--blocks", "1", "--out", "out")
    assert "IMAGES: expected a folder of images" in refused("gone", "--blocks", "1", "--out", "out")
    assert not Path("out").exists()
    assert main(["harvest", "--blocks", "1", "--out", "out"]) == 0
    assert "holds a run with other settings: blocks ([1] there, [2] now)" in refused("--blocks", "2", "--out", "out")
    for given in (["--out", "out"], ["--blocks", "1"]):
        with pytest.raises(SystemExit):
            main(["harvest", *given])
    assert torch.equal(Activations("out").read(1, 0, 1), Activations("out").read(1, 0, 6)[:1])
