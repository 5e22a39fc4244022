"""Photographs of solar cells, sound or defective, from the PyPI package `elpv-dataset`.

Data: Buerhop-Lutz et al. 2018 and Deitsch et al. 2019 (arXiv:1807.02894), CC BY-NC-SA 4.0: for non-commercial use. The
pictures stay in that package. It gives each cell a probability of a defect; doubtful ones (1/3 and 2/3) are left out.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from examples.solar.model import MEAN, STD
from fga_fast import Preprocess
from fga_fast.dataset.items import Item, stable_number

CLASS_NAMES = ("sound cell", "defective cell")
Part = Literal["train", "test"]


def cells(part: Part) -> list[Item]:
    """Sound (0) and defective (1) cells; three of five are for training. A cell's name decides.

    The data set does not say which cells come from one module, so cells of one module may be in both parts.

    Raises:
        ImportError: `elpv-dataset` is not installed.
    """
    found = find_spec("elpv_dataset")
    if found is None or not found.submodule_search_locations:
        raise ImportError("elpv-dataset is missing: pip install --no-deps elpv-dataset==1.0.0.post1")
    folder = Path(found.submodule_search_locations[0]) / "data"
    rows = (row.split() for row in (folder / "labels.csv").read_text(encoding="utf-8").splitlines())
    items = [
        Item(name, folder / name, int(float(probability)))
        for name, probability, _ in rows
        if float(probability) in (0.0, 1.0)
    ]
    return [item for item in items if (stable_number(item.key, "solar") % 5 < 3) == (part == "train")]


def preprocess(image_size: int) -> Preprocess:
    """From a picture to the model's input."""
    return Preprocess((image_size, image_size), MEAN, STD, crop_pct=1.0)
