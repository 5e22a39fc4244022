"""HyperKvasir's labelled images, classified by a fine-tuned ViT-B/16.

Source: Borgli et al., Scientific Data 7, 283 (2020), https://datasets.simula.no/hyper-kvasir.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from fga_fast.dataset.items import Item
from fga_fast.evaluation.recipes.recipe import VIT_B_16, Recipe, by_class, items_of, root_of

CLASSES = (
    "barretts", "barretts-short-segment", "bbps-0-1", "bbps-2-3", "cecum", "dyed-lifted-polyps",
    "dyed-resection-margins", "esophagitis-a", "esophagitis-b-d", "hemorrhoids", "ileum", "impacted-stool", "polyps",
    "pylorus", "retroflex-rectum", "retroflex-stomach", "ulcerative-colitis-grade-0-1", "ulcerative-colitis-grade-1",
    "ulcerative-colitis-grade-1-2", "ulcerative-colitis-grade-2", "ulcerative-colitis-grade-2-3",
    "ulcerative-colitis-grade-3", "z-line",
)  # fmt: skip
_TRACTS = ("lower-gi-tract", "upper-gi-tract")


def _read(folder: Path, classes: Sequence[str], known: Collection[str]) -> list[Item]:
    root = root_of(folder, "labeled-images", _TRACTS)
    folders = [path for tract in _TRACTS for path in (root / tract).glob("*/*")]
    return items_of(root, by_class(folders, classes, known))


RECIPE = Recipe(
    name="hyperkvasir",
    model="vit_base_patch16_224",
    preprocess=VIT_B_16,
    layout="labeled-images/TRACT/KIND/CLASS/*.jpg with the tracts lower-gi-tract and upper-gi-tract and, unless "
    f"others are asked for, the {len(CLASSES)} classes {', '.join(CLASSES)}",
    classes=lambda: dict(zip(CLASSES, CLASSES, strict=True)),
    read=_read,
)
