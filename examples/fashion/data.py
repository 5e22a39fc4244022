"""Scenes of real Fashion-MNIST garments on a noisy canvas, with the true place of each garment.

A scene is a 56 x 56 RGB image with two or three different garments. Each is in its own quadrant, slightly shifted and
scaled, so garments hardly overlap. One `torch.Generator` draws everything in batches: the same seed gives the same
scenes.

Data: Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747), MIT licence. Read from the Debian package
`dataset-fashion-mnist` if it is installed, otherwise downloaded by torchvision.
"""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DOWNLOAD_FOLDER = Path.home() / ".cache" / "fga_fast" / "fashion-mnist"
ALL_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
IMAGE_SIZE = 56
GARMENT_SIZE = 28
MAX_GARMENTS = 3
VALIDATION_GARMENTS = 2500  # the last of the 60,000 training garments; not trained on, but used to make decisions

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Garments:
    """Single garments and their classes.

    Attributes:
        images: [M, 28, 28] float32 in [0, 1], black background.
        members: one int64 tensor of row numbers into `images` for each class name.
        class_names: the names of the classes in `members`.
    """

    images: Tensor
    members: tuple[Tensor, ...]
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Scenes:
    """A batch of B scenes.

    Attributes:
        images: [B, 3, 56, 56] float32 in [0, 1].
        targets: [B, classes] float32, 1 where the class is in the scene.
        classes: [B, 3] int64, the class of each garment; -1 where the scene has only two.
        masks: [B, 3, 56, 56] bool, the visible pixels of each garment.
        boxes: [B, 3, 4] int64, x0, y0, x1, y1 (end excluded) around each mask; zeros where there is no garment.
    """

    images: Tensor
    targets: Tensor
    classes: Tensor
    masks: Tensor
    boxes: Tensor


def load_garments(split: Split, class_names: tuple[str, ...] = ALL_CLASSES) -> Garments:
    """Load the single garments of one split; "validation" is the end of the official training set."""
    unknown = set(class_names) - set(ALL_CLASSES)
    if unknown:
        raise ValueError(f"class_names: expected names from {ALL_CLASSES}, got {sorted(unknown)}")
    images, labels = _read_official(train=split != "test")
    if split == "train":
        images, labels = images[:-VALIDATION_GARMENTS], labels[:-VALIDATION_GARMENTS]
    elif split == "validation":
        images, labels = images[-VALIDATION_GARMENTS:], labels[-VALIDATION_GARMENTS:]
    members = tuple(torch.from_numpy(np.flatnonzero(labels == ALL_CLASSES.index(name))) for name in class_names)
    return Garments(torch.from_numpy(images).float() / 255, members, class_names)


def _read_official(train: bool) -> tuple[np.ndarray, np.ndarray]:
    """The official split as images [M, 28, 28] uint8 and labels [M] int64."""
    if DEBIAN_FOLDER.is_dir():
        stem = DEBIAN_FOLDER / ("train" if train else "t10k")
        images = np.frombuffer(gzip.decompress(Path(f"{stem}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
        labels = np.frombuffer(gzip.decompress(Path(f"{stem}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
        return images.reshape(-1, GARMENT_SIZE, GARMENT_SIZE).copy(), labels.astype(np.int64)
    try:
        from torchvision.datasets import FashionMNIST
    except ImportError as error:
        raise RuntimeError(
            "no Fashion-MNIST found: install the Debian package dataset-fashion-mnist, or torchvision to download it"
        ) from error
    data = FashionMNIST(str(DOWNLOAD_FOLDER), train=train, download=True)
    return data.data.numpy(), data.targets.numpy().astype(np.int64)


def make_scenes(
    garments: Garments,
    count: int,
    generator: torch.Generator,
    augment: bool = False,
    fewest: int = 2,
    most: int = MAX_GARMENTS,
) -> Scenes:
    """Draw `count` scenes of `fewest` to `most` garments.

    `augment` adds flips, tilts, erased patches and stronger shading (for training only).
    """
    classes = _draw_classes(len(garments.members), count, generator, fewest, most)
    picked = _draw_garments(garments, classes, generator)
    if augment:
        picked = _erase(picked, generator)
    placed = _place(picked, classes, generator, augment)
    shade = 0.5 if augment else 0.7
    images, masks = _compose(placed, shade, generator)
    targets = torch.zeros(count, len(garments.members) + 1).scatter_(1, classes % (len(garments.members) + 1), 1.0)
    return Scenes(images, targets[:, :-1], classes, masks, _boxes(masks))


def patch_classes(scenes: Scenes, patch: int, background: int, cover: float = 0.25) -> Tensor:
    """The class that covers each patch, [B, P] int64; `background` if none covers more than the share `cover` of it."""
    share, garment = F.avg_pool2d(scenes.masks.float(), patch).flatten(2).max(dim=1)  # [B, P] both
    return torch.where(share > cover, scenes.classes.gather(1, garment), background)


def _draw_classes(n_classes: int, count: int, generator: torch.Generator, fewest: int, most: int) -> Tensor:
    """[count, most]: the different classes of each scene, filled with -1 if a scene has fewer garments."""
    classes = torch.rand(count, n_classes, generator=generator).argsort(dim=1)[:, :most]
    number = torch.randint(fewest, most + 1, (count, 1), generator=generator)
    return classes.masked_fill(torch.arange(most) >= number, -1)


def _draw_garments(garments: Garments, classes: Tensor, generator: torch.Generator) -> Tensor:
    """One garment [28, 28] for each entry of `classes`, black for class -1."""
    draw = torch.rand(classes.shape, generator=generator)
    rows = torch.zeros_like(classes)
    for index, member in enumerate(garments.members):
        here = classes == index
        rows[here] = member[(draw[here] * len(member)).long()]
    return garments.images[rows] * (classes >= 0)[..., None, None]


def _erase(picked: Tensor, generator: torch.Generator) -> Tensor:
    """Blacken a 7 x 7 square in a tenth of the garments, so that no single detail decides."""
    shape = picked.shape[:2]
    corner = torch.rand(*shape, 2, generator=generator) * (GARMENT_SIZE - 7)
    chosen = torch.rand(shape, generator=generator) < 0.1
    pixel = torch.arange(GARMENT_SIZE)
    inside = (pixel >= corner[..., None]) & (pixel < corner[..., None] + 7)  # [B, 3, 2, 28]
    square = inside[:, :, 0, :, None] & inside[:, :, 1, None, :] & chosen[..., None, None]
    return picked.masked_fill(square, 0.0)


def _place(picked: Tensor, classes: Tensor, generator: torch.Generator, augment: bool) -> Tensor:
    """Move each garment [28, 28] into its own quadrant: [B, 3, 56, 56]."""
    count, slots = classes.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    quadrant = torch.rand(count, 4, generator=generator).argsort(dim=1)[:, :slots]
    side = torch.stack((quadrant % 2, quadrant // 2), dim=-1).float() * 2 - 1  # -1: left or top, +1: right or bottom
    scale = uniform(0.97, 1.0, slots)
    # A garment starts flush with its corner of the canvas and moves inwards by at most a pixel.
    centre = IMAGE_SIZE / 2 - GARMENT_SIZE / 2 * scale[..., None] - uniform(0, 1, slots, 2)
    centre = side * centre / (IMAGE_SIZE / 2)  # in [-1, 1]
    angle = uniform(-math.radians(3), math.radians(3), slots) * float(augment)
    mirror = torch.where((uniform(0, 1, slots) < 0.5) & augment, -1.0, 1.0)
    # Output to input coordinates: the garment image spans [-1, 1], half of the canvas at scale 1.
    zoom = IMAGE_SIZE / GARMENT_SIZE / scale
    cos, sin = zoom * torch.cos(angle), zoom * torch.sin(angle)
    rows = torch.stack((torch.stack((cos * mirror, -sin * mirror), -1), torch.stack((sin, cos), -1)), -2)
    theta = torch.cat((rows, -(rows @ centre[..., None])), dim=-1).flatten(0, 1)  # [B * 3, 2, 3]
    grid = F.affine_grid(theta, [len(theta), 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    placed = F.grid_sample(picked.reshape(-1, 1, GARMENT_SIZE, GARMENT_SIZE), grid, align_corners=False)
    return placed.view(count, slots, IMAGE_SIZE, IMAGE_SIZE)


def _compose(placed: Tensor, shade: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Lay tinted garments on a noisy canvas: images [B, 3, 56, 56] in [0, 1] and visible masks [B, 3, 56, 56]."""
    count, slots = placed.shape[:2]
    level = 0.05 + 0.2 * torch.rand(count, 1, 1, 1, generator=generator)
    cast = 0.04 * torch.randn(count, 3, 1, 1, generator=generator)
    stains = 0.06 * torch.randn(count, 1, 7, 7, generator=generator)
    grain = (0.03 + 0.05 * torch.rand(count, 1, 1, 1, generator=generator)) * torch.randn(
        count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator
    )
    images = level + cast + F.interpolate(stains, IMAGE_SIZE, mode="bilinear") + grain
    tint = 0.65 + 0.35 * torch.rand(count, slots, 3, generator=generator)
    grey = torch.rand(count, slots, 1, generator=generator) < 0.5
    tint = torch.where(grey, torch.ones(()), tint)
    tint = tint * (shade + (1 - shade) * torch.rand(count, slots, 1, generator=generator))
    masks = torch.zeros(placed.shape, dtype=torch.bool)
    for index in range(slots):
        garment = placed[:, index, None]  # [B, 1, 56, 56]
        cover = (garment * 12).clamp(0, 1)  # nearly black fabric still hides the canvas
        images = images * (1 - cover) + garment * tint[:, index, :, None, None] * cover
        visible = cover[:, 0] > 0.5
        masks[:, :index] &= ~visible[:, None]
        masks[:, index] = visible
    return images.clamp(0, 1), masks


def _boxes(masks: Tensor) -> Tensor:
    """x0, y0, x1, y1 (end excluded) around each mask [B, 3, H, W]; zeros where the mask is empty."""
    edges = []
    for dim in (-2, -1):  # seen from above: columns; seen from the side: rows
        line = masks.any(dim).long()
        edges.append((line.argmax(-1), line.shape[-1] - line.flip(-1).argmax(-1)))
    (x0, x1), (y0, y1) = edges
    return torch.stack((x0, y0, x1, y1), dim=-1) * masks.flatten(2).any(-1)[..., None]
