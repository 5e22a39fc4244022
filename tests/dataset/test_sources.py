"""Data sets: what becomes an item, what a row's mistake is called, and where masks end up."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from fga_fast import Preprocess
from fga_fast.assets import fashion_items
from fga_fast.dataset import sources
from fga_fast.dataset.items import Item, digest_of, half_of, load, view_of

NAMES = ("cat", "dog, hound", "boat")
PLAIN = Preprocess((8, 8), (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def run(name: str, size: tuple[int, int] = (20, 10), colour: str = "red") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, colour).save(path)
        return path

    return run


def test_folders(save: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("cat/b.png", "cat/a.png", "Hound/a.png", "2/a.png", ".git/a.png"):
        save(name)
    (tmp_path / "2" / "notes.txt").write_text("")
    found = sources.from_folder(tmp_path, NAMES)
    assert [(one.key, one.target) for one in found] == [
        ("2/a.png", 2), ("Hound/a.png", 1), ("cat/a.png", 0), ("cat/b.png", 0),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"got 1 that are and 2 that are not, such as Hound \(expected a class number"):
        sources.from_folder(tmp_path)
    save("day/c.png")
    with pytest.raises(ValueError, match=r"3 that are and 1 that are not, such as day .*--manifest FILE"):
        sources.from_folder(tmp_path, NAMES)
    assert [one.target for one in sources.from_folder(tmp_path / "day", NAMES)] == [None]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"IMAGES: no image in .*empty"):
        sources.from_folder(tmp_path / "empty")
    with pytest.raises(NotADirectoryError, match="IMAGES: expected a folder"):
        sources.from_folder(tmp_path / "gone")


def test_sub_folders_that_are_no_classes(save: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("monday/a.png", "tuesday/a.png", "a.png"):
        save(name)
    found = sources.from_folder(tmp_path, NAMES)
    assert [(one.key, one.target) for one in found] == [
        ("a.png", None),
        ("monday/a.png", None),
        ("tuesday/a.png", None),
    ]


def manifest(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "list.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_manifest(tmp_path: Path) -> None:
    text = "Image, target,mask,X0,y0,x1,y1\na.png,hound,,1,2,3,4\nb.png,0,m.png,,,,\na.png,,,,,,\n"
    found = sources.from_manifest(manifest(tmp_path, text), NAMES)
    assert [(one.key, one.unit, one.target, one.box) for one in found] == [
        ("a.png", "a.png", 1, (1, 2, 3, 4)), ("b.png", "b.png", 0, None), ("a.png#2", "a.png", None, None),
    ]  # fmt: skip
    assert (found[0].image, found[1].mask) == (tmp_path / "a.png", tmp_path / "m.png")


def test_a_way_through_a_link_is_another_image(tmp_path: Path, save: Callable[..., Path]) -> None:
    for name in ("a.png", "far/a.png", "far/b/c.png"):
        save(name)
    (tmp_path / "b").symlink_to(tmp_path / "far" / "b", target_is_directory=True)
    found = sources.from_manifest(manifest(tmp_path, "image\na.png\nb/../a.png"))  # the second is far/a.png
    assert [one.unit for one in found] == ["a.png", "b/../a.png"]


def test_an_image_has_one_name_however_its_path_is_written(
    tmp_path: Path, save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "b/c.png", "in/d.png"):
        save(name)
    ways = ("a.png", "./a.png", "b/../a.png", ".//a.png", f"../{tmp_path.name}/a.png", str(tmp_path / "a.png"))
    text = "\n".join(["image", *ways, "./b/c.png", str(tmp_path / "b" / "." / "c.png")])
    found = sources.from_manifest(manifest(tmp_path, text))
    assert [one.unit for one in found] == ["a.png"] * len(ways) + ["b/c.png"] * 2
    assert [one.key for one in found[:3]] == ["a.png", "a.png#2", "a.png#3"]
    assert {one.image.resolve() for one in found[: len(ways)]} == {(tmp_path / "a.png").resolve()}  # type: ignore[union-attr]
    assert len({half_of(one.unit) for one in found[: len(ways)]}) == 1
    # Nothing depends on where the call is made, nor on the machine's folders, but for images elsewhere.
    monkeypatch.chdir(tmp_path / "b")
    again = sources.from_manifest("../list.csv")
    assert [one.key for one in again] == [one.key for one in found]
    (tmp_path / "in" / "list.csv").write_text(f"image\n../a.png\n{tmp_path / 'a.png'}\n", encoding="utf-8")
    outside = sources.from_manifest(tmp_path / "in" / "list.csv")
    assert [one.unit for one in outside] == ["../a.png", (tmp_path / "a.png").as_posix()]


def test_a_parquet_manifest(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "list.parquet"
    columns = {"image": ["a.png", "b.png"], "target": [2.0, float("nan")], "x0": [0, None], "y0": [0, None]}
    parquet.write_table(arrow.table({**columns, "x1": [1.5, None], "y1": [2, None]}), path)
    twice = tmp_path / "twice.parquet"
    parquet.write_table(arrow.table({"image": ["a.png"], "IMAGE ": ["b.png"]}), twice)
    with pytest.raises(ValueError, match=r"expected one column image in .*twice\.parquet, got 2"):
        sources.from_manifest(twice)
    first, second = sources.from_manifest(path, NAMES)
    assert (first.target, first.box, second.target, second.box) == (2, (0, 0, 1.5, 2), None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,target\na.png,1\n", r"expected a column image in .*list.csv, got file, target"),
        ("image\n", "expected at least one row"),
        ("image,target,Target\na.png,1,2\n", "expected one column target in .*list.csv, got 2; rename the others"),
        ("image,x0,x0\na.png,1,2\n", "expected one column x0 in"),
        ("image,target\na.png,1\n,1\n", "list.csv, row 2, column image: expected a path, got nothing"),
        ("image,target\na.png,3\n", "row 1, column target: expected a class number of 0 to 2, got 3"),
        ("image,target\na.png,-1\n", "row 1, column target: expected a class number of 0 to 2, got -1"),
        ("image,target\na.png,cot\n", r"row 1, column target: 'cot' is not among .* did you mean 'cat'"),
        (
            "image,x0,y0,x1,y1\na.png,1,2,3,4\nb.png,1,2,,4\n",
            "row 2, column x1: expected a number of pixels, got nothing",
        ),
        ("image,x0,y0,x1,y1\na.png,1,two,3,4\n", "row 1, column y0: expected a number of pixels, got 'two'"),
        ("image,x0,y0,x1,y1\na.png,3,2,3,4\n", "row 1, column x1: expected 0 <= x0 < x1, got x0 = 3 and x1 = 3"),
        ("image,x0,y0,x1,y1\na.png,1,nan,3,4\n", "column y1: expected 0 <= y0 < y1, got y0 = nan"),
        ("image,mask,x0,y0,x1,y1\na.png,m.png,1,2,3,4\n", "row 1, column mask: expected a mask or a box, got both"),
        ("image,target\na, b.png,1\n", "row 1: expected 2 columns, got more; put values with commas in quotes"),
    ],
)
def test_mistakes_in_a_manifest(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sources.from_manifest(manifest(tmp_path, text), NAMES)


def test_names_need_a_model_that_has_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names of the classes are not known, got 'cat'"):
        sources.from_manifest(manifest(tmp_path, "image,target\na.png,cat\n"))
    (tmp_path / "old.csv").write_bytes("image,target\nfü.png,1\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"manifest: old\.csv is not UTF-8 .*; save it as UTF-8"):
        sources.from_manifest(tmp_path / "old.csv")
    spaced = sources.from_manifest(manifest(tmp_path, "image, target\na.png, 1\n"), NAMES)
    assert spaced[0].target == 1
    with pytest.raises(FileNotFoundError, match="manifest: no file"):
        sources.from_manifest(tmp_path / "gone.csv")


def test_the_shipped_scenes() -> None:
    found = fashion_items()
    assert len(found) == 16 and len({one.unit for one in found}) == 6
    assert (found[0].key, found[0].target, found[0].box) == ("scene_0.png#Trouser", 1, (37, 27, 48, 56))
    loaded = load(found[0], Preprocess((56, 56)))
    assert loaded.mask is not None and int(loaded.mask.sum()) == 11 * 29 and bool(loaded.mask[27:56, 37:48].all())


def test_a_hugging_face_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="datasets is missing, which is needed here: pip install 'datasets'"):
        sources.from_huggingface("me/pets")

    class Label:
        names = ("boat", "cat")

    class Data(list[dict[str, Any]]):
        features: ClassVar = {"image": object(), "label": Label()}
        _fingerprint = ""

        def __getitem__(self, key: Any) -> Any:
            return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)

    picture = Image.new("RGB", (8, 8), "blue")
    fake = ModuleType("datasets")
    labelled = Data([{"image": picture, "label": 1}, {"image": 3, "label": 0}])
    fake.load_dataset = lambda name, split: labelled  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    first, second = sources.from_huggingface("me/pets", NAMES)
    assert (first.key, first.target, second.target) == ("test/0", 0, 2)
    assert [one.target for one in sources.from_huggingface("me/pets")] == [1, 0]  # classes of the model by number
    assert load(first, PLAIN).image.shape == (3, 8, 8)
    with pytest.raises(ValueError, match="row 2, column image: expected a picture, got int"):
        load(second, PLAIN)
    unlabelled = Data([{"image": picture, "label": -1}, {"image": picture, "label": None}])
    monkeypatch.setattr(fake, "load_dataset", lambda name, split: unlabelled)
    assert [one.target for one in sources.from_huggingface("me/pets", NAMES)] == [None, None]
    monkeypatch.setattr(fake, "load_dataset", lambda name, split: labelled)
    digests = {digest_of([first, second])}
    for labelled._fingerprint in ("3f", "40"):
        digests.add(digest_of([first, second]))
    assert len(digests) == 3
    with pytest.raises(ValueError, match="row 2, column label: 'boat' is not among"):
        sources.from_huggingface("me/pets", ("cat", "dog"))
    with pytest.raises(ValueError, match="dataset: expected a column photo in me/pets, got image, label"):
        sources.from_huggingface("me/pets", image="photo")


def test_masks_and_boxes_take_the_way_of_the_image(save: Callable[..., Path], tmp_path: Path) -> None:
    """A picture of 20 x 10 is cut to its middle 10 x 10 and made 8 x 8."""
    path = save("wide.png")
    inside = np.zeros((10, 20), dtype=np.uint8)
    inside[:5, 10:] = 3  # a number of a palette
    Image.fromarray(inside).save(tmp_path / "mask.png")
    by_mask = load(Item("a", path, mask=tmp_path / "mask.png"), PLAIN)
    by_box = load(Item("a", path, box=(10, 0, 20, 5)), PLAIN)
    want = torch.zeros(8, 8, dtype=torch.bool)
    want[:4, 4:] = True
    assert by_mask.mask is not None and torch.equal(by_mask.mask, want)
    assert by_box.mask is not None and torch.equal(by_box.mask, want)
    colour = Image.merge("RGB", [Image.new("L", (20, 10)), Image.fromarray(inside), Image.new("L", (20, 10))])
    for mode in (colour, Image.fromarray(inside > 0)):
        found = load(Item("a", path, mask=mode), PLAIN).mask
        assert found is not None and torch.equal(found, want)
    assert load(Item("a", path, box=(0, 0, 4, 10)), PLAIN).mask is None  # cropped away: no mask, but the image
    assert load(Item("a", torch.zeros(3, 8, 8), box=(9, 9, 12, 12)), None).mask is None
    narrow = load(Item("a", path, box=(10.2, 3, 10.4, 4)), PLAIN).mask
    assert narrow is not None and bool(narrow.any())
    white = np.stack([inside, np.full_like(inside, 255)], -1)
    found = load(Item("a", path, mask=Image.fromarray(white, "LA")), PLAIN).mask  # alpha is no object
    assert found is not None and torch.equal(found, want)
    with pytest.raises(ValueError, match=r"mask: expected the size \(20, 10\) of the image a, got \(4, 4\)"):
        load(Item("a", path, mask=Image.new("L", (4, 4))), PLAIN)
    with pytest.raises(ValueError, match="preprocess: expected a Preprocess for the picture a, got None"):
        load(Item("a", path), None)


def test_tensors_are_taken_as_they_are() -> None:
    image = torch.randn(3, 8, 8)
    mask = torch.rand(8, 8) > 0.5
    assert load(Item("a", image, mask=mask), None).mask is mask
    with pytest.raises(ValueError, match=r"mask: expected a bool tensor \[8, 8\] for a, got torch.Size\(\[4, 4\]\)"):
        load(Item("a", image, mask=mask[:4, :4]), None)
    for channels in (1, 3, 5):
        assert view_of(Item("a", torch.randn(channels, 8, 6)), None).size == (6, 8)
