"""Data sets as items: a folder of images, a CSV or Parquet manifest, a Hugging Face dataset."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fga_fast.dataset.extras import need
from fga_fast.dataset.items import Box, Item
from fga_fast.io.images import list_images
from fga_fast.question.names import class_number

Names = Sequence[str] | None
_BOX = ("x0", "y0", "x1", "y1")


def from_folder(folder: str | Path, class_names: Names = None) -> list[Item]:
    """The images of a folder, or of its sub-folders, which may be named by class.

    If each sub-folder is named by a class number or by a name in `class_names`, its class is explained. If none is, the
    predicted class is.

    Raises:
        NotADirectoryError, ValueError: no folder, no image in it, or some sub-folders named by class and some not.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"IMAGES: expected a folder of images, got {folder}")
    below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    classes = _folder_classes([path.name for path in below], class_names)
    items = []
    for path in (folder, *below):
        try:
            images = list_images(path)
        except ValueError:  # no image in it
            continue
        target = classes.get(path.name) if path != folder else None
        items += [Item(image.relative_to(folder).as_posix(), image, target) for image in images]
    if not items:
        raise ValueError(f"IMAGES: no image in {folder} or its sub-folders; give a folder of images or --manifest FILE")
    return items


def _folder_classes(folders: list[str], names: Names) -> dict[str, int]:
    classes, unknown = {}, []
    for folder in folders:
        try:
            classes[folder] = _class(folder, names)
        except ValueError as error:
            unknown.append(f"{folder} ({error})")
    if classes and unknown:
        raise ValueError(
            f"IMAGES: expected a class name or number for each sub-folder or for none, got {len(classes)} that are and "
            f"{len(unknown)} that are not, such as {unknown[0]}; rename them, or give --manifest FILE"
        )
    return classes


def from_manifest(file: str | Path, class_names: Names = None) -> list[Item]:
    """The rows of a CSV or Parquet file with the columns image, and if you like target, mask, and x0, y0, x1, y1.

    Names of columns may have capitals. Paths are relative to the file's folder. A target is a class number or a name in
    `class_names`; where it is empty the predicted class is explained. Rows of the same image are different questions
    about it: they stay in the same half, and count as one image in tests. So do `a.png`, `./a.png` and `b/../a.png`.

    Raises:
        FileNotFoundError, ValueError: no such file, no column `image`, or a value that does not fit; the message names
            the row, counted from 1 below the header, and the column.
        ImportError: a Parquet file without pyarrow.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"manifest: no file {file}; expected a CSV or Parquet file with a column image")
    rows = [{str(name).strip().lower(): value for name, value in row.items()} for row in _rows(file)]
    if not rows:
        raise ValueError(f"manifest: expected at least one row in {file}, got none")
    if "image" not in rows[0]:
        raise ValueError(
            f"manifest: expected a column image in {file}, got {', '.join(map(str, rows[0]))}; rename the column"
        )
    items, seen = [], Counter[str]()
    for number, row in enumerate(rows, start=1):
        where = f"manifest: {file.name}, row {number}"
        name = _text(row.get("image"))
        if not name:
            raise ValueError(f"{where}, column image: expected a path, got nothing; fill it in or delete the row")
        target, box = _target(row, where, class_names), _box(row, where)
        mask = _text(row.get("mask"))
        if mask and box:
            raise ValueError(f"{where}, column mask: expected a mask or a box, got both; leave one of them empty")
        unit = _unit(name, file.parent)
        seen[unit] += 1
        key = unit if seen[unit] == 1 else f"{unit}#{seen[unit]}"
        items.append(Item(key, file.parent / name, target, file.parent / mask if mask else None, box, group=unit))
    return items


def _unit(image: str, folder: Path) -> str:
    """One name for an image however its path is written: relative to the folder, or absolute if it is not in it.

    Two ways to a file through links are two images.
    """
    root = Path(os.path.normpath(folder.absolute()))
    path = Path(os.path.normpath(root / image))
    if ".." in Path(image).parts and path.resolve() != (root / image).resolve():
        return Path(image).as_posix()  # the way leads through a link to a folder, so it is no shorter
    apart = Path(image).is_absolute() and not path.is_relative_to(root)
    return (path if apart else Path(os.path.relpath(path, root))).as_posix()


def _rows(file: Path) -> list[dict[str, Any]]:
    if file.suffix.lower() in (".parquet", ".pq"):
        table: Any = need("pyarrow.parquet").read_table(file)
        _check_columns(file, table.column_names)
        rows: list[dict[str, Any]] = table.to_pylist()
        return rows
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:
            reader = csv.DictReader(text)
            _check_columns(file, reader.fieldnames or [])
            read = list(reader)
    except UnicodeDecodeError as error:
        raise ValueError(f"manifest: {file.name} is not UTF-8 ({error.reason}); save it as UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"manifest: {file.name} is no CSV file that can be read: {error}") from error
    for number, row in enumerate(read, start=1):
        if None in row:
            raise ValueError(
                f"manifest: {file.name}, row {number}: expected {len(row) - 1} columns, got more; put values with "
                "commas in quotes"
            )
    return read


def _check_columns(file: Path, names: Sequence[str]) -> None:
    counts = Counter(str(name).strip().lower() for name in names)
    for name in ("image", "target", "mask", *_BOX):
        if counts[name] > 1:
            raise ValueError(f"manifest: expected one column {name} in {file}, got {counts[name]}; rename the others")


def _text(value: Any) -> str:
    return "" if value is None or value != value else str(value).strip()  # NaN is not equal to itself


def _target(row: dict[str, Any], where: str, names: Names) -> int | None:
    text = _text(row.get("target"))
    if not text:
        return None
    # What tables of numbers with gaps make of a class number.
    text = text.removesuffix(".0") if isinstance(row["target"], float) else text
    try:
        return _class(text, names)
    except ValueError as error:
        raise ValueError(f"{where}, column target: {error}") from None


def _class(text: str, names: Names) -> int:
    """The class that a number or a name means."""
    if text.isascii() and text.lstrip("-").isdecimal():
        number, classes = int(text), None if names is None else len(names)
        if number < 0 or (classes is not None and number >= classes):
            upto = "at least 0" if classes is None else f"0 to {classes - 1}"
            raise ValueError(f"expected a class number of {upto}, got {number}; classes are counted from 0")
        return number
    if names is None:
        raise ValueError(f"expected a class number, since the names of the classes are not known, got {text!r}")
    try:
        return class_number(text, names, "target")
    except ValueError as error:
        raise ValueError(str(error).removeprefix("target: ")) from None


def _box(row: dict[str, Any], where: str) -> Box | None:
    texts = {name: _text(row.get(name)) for name in _BOX}
    if not any(texts.values()):
        return None
    sides = []
    for name, text in texts.items():
        try:
            sides.append(float(text))
        except ValueError:
            got = repr(text) if text else "nothing"
            raise ValueError(f"{where}, column {name}: expected a number of pixels, got {got}") from None
    x0, y0, x1, y1 = sides
    for low, high, name in ((x0, x1, "x1"), (y0, y1, "y1")):
        if not 0 <= low < high < float("inf"):
            raise ValueError(
                f"{where}, column {name}: expected 0 <= {name[0]}0 < {name}, got {name[0]}0 = {low:g} and {name} = "
                f"{high:g}; a box is x0, y0, x1, y1 in pixels, ends excluded"
            )
    return x0, y0, x1, y1


def from_huggingface(
    name: str, class_names: Names = None, *, split: str = "test", image: str = "image", label: str = "label"
) -> list[Item]:
    """The rows of a dataset that the library `datasets` loads, from its cache or from the Hugging Face hub.

    Labels with names that the model knows are found by name, others are class numbers. Which version of the dataset it
    is, its fingerprint says, which `items.digest_of` takes in.

    Args:
        split: part of the dataset.
        image, label: its columns; a dataset without the column `label` has its predicted classes explained.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: no column `image`, or a label that is no class of the model.
    """
    data: Any = need("datasets").load_dataset(name, split=split)
    if image not in data.features:
        raise ValueError(f"dataset: expected a column {image} in {name}, got {', '.join(data.features)}")
    targets: list[int | None] = [None] * len(data)
    if label in data.features:
        own = getattr(data.features[label], "names", None)  # of a ClassLabel
        for row, value in enumerate(data[label]):
            if value is None or value == -1:  # as datasets mark what has no label
                continue
            text = own[value] if own is not None and class_names is not None else str(value)
            try:
                targets[row] = _class(text, class_names)
            except ValueError as error:
                raise ValueError(f"dataset: {name}, row {row + 1}, column {label}: {error}") from None
    return [Item(f"{split}/{row}", Cell(data, row, image), target) for row, target in enumerate(targets)]


@dataclass(frozen=True, eq=False)
class Cell:
    """A picture of a Hugging Face dataset, read when it is called.

    Raises:
        ValueError: there is no picture.
    """

    data: Any
    row: int
    column: str

    def __call__(self) -> Image.Image:
        picture = self.data[self.row][self.column]
        if not isinstance(picture, Image.Image):
            kind = type(picture).__name__
            raise ValueError(f"dataset: row {self.row + 1}, column {self.column}: expected a picture, got {kind}")
        return picture

    @property
    def state(self) -> str:
        """The dataset's fingerprint, which changes with its rows."""
        return str(getattr(self.data, "_fingerprint", ""))
