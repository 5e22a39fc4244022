"""COVID-QU-Ex, chest X-rays with masks of infections and lungs, classified by a fine-tuned ViT-B/16.

Source: Tahir et al., Computers in Biology and Medicine 139, 105002 (2021),
https://www.kaggle.com/datasets/anasmohammedtahir/covidqu.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from fga_fast.dataset.items import Item
from fga_fast.evaluation.recipes.recipe import VIT_B_16, Recipe, by_class, items_of, root_of

CLASSES = ("COVID-19", "Non-COVID", "Normal")
PART = "Infection Segmentation Data"
MASKS = ("infection masks", "lung masks")  # the first that a part has is taken


def _read(folder: Path, classes: Sequence[str], known: Collection[str]) -> list[Item]:
    root = root_of(folder, PART, ["Test"])
    folders = by_class((root / "Test").iterdir(), classes, known)
    masks = next((kind for kind in MASKS if any((path / kind).is_dir() for path in folders.values())), MASKS[-1])
    return items_of(root, {name: path / "images" for name, path in folders.items()}, masks)


RECIPE = Recipe(
    name="covid-qu-ex",
    model="vit_base_patch16_224",
    preprocess=VIT_B_16,
    layout=f"{PART}/Test/CLASS/images/*.png with a mask of the same name in CLASS/infection masks, for the classes "
    f"{', '.join(CLASSES)}; or the same with CLASS/lung masks in the folder 'Lung Segmentation Data', if that is given",
    classes=lambda: dict(zip(CLASSES, CLASSES, strict=True)),
    read=_read,
    metrics=("saco", "faithfulness_correlation", "pixel_flipping", "localisation"),
)
