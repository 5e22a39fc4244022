"""What is evaluated: an image with the class to explain and, if known, where the object is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fga_fast.io.digest import bytes_of
from fga_fast.io.images import Preprocess, load_image
from fga_fast.io.window import Window

Half = Literal["tune", "report"]
Split = Literal["report", "tune", "both"]
Source: TypeAlias = "Path | Image.Image | Tensor | Callable[[], Image.Image]"
Box: TypeAlias = tuple[float, float, float, float]


@dataclass(frozen=True)
class Item:
    """One question to all methods.

    Attributes:
        key: its name, unique in the data set and the same in every run.
        image: a file, a picture, a function that reads one, or a tensor [channels, H, W] that is the model's input.
        target: class to explain; None: the class that the model predicts.
        mask: pixels of the object: a picture of the image's size whose pixels above 0 count, or for a tensor image a
            bool tensor [H, W].
        box: the object's place instead: x0, y0, x1, y1 in pixels of the upright image, ends excluded.
        group: what it shares with other items that are not independent of it, such as the name of their image. Items of
            a group are in the same half and count as one in tests. By default its key.
    """

    key: str
    image: Source
    target: int | None = None
    mask: Path | Image.Image | Tensor | None = None
    box: Box | None = None
    group: str = ""

    @property
    def unit(self) -> str:
        """What counts as one image in tests."""
        return self.group or self.key


class Loaded(NamedTuple):
    """What the model and the metrics take of an item."""

    image: Tensor  # [channels, H, W]
    mask: Tensor | None  # [H, W] bool


def half_of(unit: str, seed: int = 0) -> Half:
    """The half of the data that a unit belongs to, the same on all machines and in every run."""
    return "tune" if stable_number(unit, "half", seed) % 2 else "report"


def stable_number(*words: object) -> int:
    """A number from 0 to 2^63 - 1 that depends on the words alone."""
    digest = hashlib.sha256("\0".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def check_items(items: list[Item]) -> None:
    """Raises ValueError for no items, an empty key, and a key that two items have."""
    if not items:
        raise ValueError("items: expected at least one image, got none")
    seen: set[str] = set()
    for item in items:
        if not item.key or item.key in seen:
            what = f"{item.key!r} twice" if item.key else "an empty one"
            raise ValueError(f"items: expected a key of its own for each item, got {what}; number the items")
        seen.add(item.key)


def choose(items: Sequence[Item], split: Split = "report", limit: int | None = None) -> list[Item]:
    """The items of a half, in their order; of more than `limit` images those whose names are drawn first.

    Raises:
        ValueError: nothing is left, or an argument is out of its range.
    """
    items = list(items)
    check_items(items)
    if split not in ("report", "tune", "both"):
        raise ValueError(f"split: expected report, tune or both, got {split!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1 image, got {limit}")
    units = {item.unit for item in items if split == "both" or half_of(item.unit) == split}
    if limit is not None:
        units = {*sorted(units, key=lambda unit: stable_number(unit, "limit"))[:limit]}
    if not units:
        raise ValueError(f"split: none of the {len(items)} items is in the half {split!r}; take both, or more images")
    return [item for item in items if item.unit in units]


def digest_of(items: Sequence[Item]) -> str:
    """A digest of which items there are, and what is asked about them; of files it knows size and time, of functions
    what their attribute `state` says.
    """
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr((item.key, item.unit, item.target, item.box)).encode())
        for source in (item.image, item.mask):
            if isinstance(source, Path) and source.is_file():
                state = source.stat()
                digest.update(f"{state.st_size} {state.st_mtime_ns}".encode())
            elif isinstance(source, torch.Tensor):
                digest.update(bytes_of(source))
            elif isinstance(source, Image.Image):
                digest.update(source.tobytes())
            elif callable(source):
                digest.update(str(getattr(source, "state", "")).encode())
    return digest.hexdigest()[:16]


def load(item: Item, preprocess: Preprocess | None, window: Window | None = None) -> Loaded:
    """Reads an item's image and mask as the model sees them.

    Raises:
        ValueError: no `preprocess` for a picture, a mask or box that does not fit.
        ImageFileError, FileNotFoundError: a file that cannot be read.
    """
    if isinstance(item.image, Tensor):
        return Loaded(item.image, _tensor_mask(item))
    picture = _picture(item.image, window)
    if preprocess is None:
        raise ValueError(f"preprocess: expected a Preprocess for the picture {item.key}, got None; say how it is read")
    view = preprocess.normalise(preprocess.view(picture))
    if item.mask is None and item.box is None:
        return Loaded(view, None)
    # The object's pixels take the way of the image's pixels; between them there is nothing to interpolate.
    plain = replace(preprocess, mean=(0.0,), std=(1.0,), interpolation="nearest")
    mask = plain(_object(item, picture.size))[0] > 0.5
    # An object that was cropped away is no reason to leave the image out of the other metrics.
    return Loaded(view, mask if bool(mask.any()) else None)


def view_of(item: Item, preprocess: Preprocess | None, window: Window | None = None) -> Image.Image:
    """What the model sees of an item, as a picture; a tensor's values are stretched to the range of colours."""
    if isinstance(item.image, Tensor) or preprocess is None:
        image = load(item, preprocess, window).image.detach().cpu().float()
        low, high = image.amin(), image.amax()
        grey = ((image - low) / (high - low).clamp(min=1e-12) * 255).round().byte().permute(1, 2, 0)
        return Image.fromarray(grey.expand(-1, -1, 3).contiguous().numpy()) if len(image) in (1, 3) else _mean(grey)
    return preprocess.view(_picture(item.image, window)).convert("RGB")


def _mean(values: Tensor) -> Image.Image:  # [H, W, channels] uint8
    return Image.fromarray(values.float().mean(-1).byte().numpy()).convert("RGB")


def _picture(source: Path | Image.Image | Callable[[], Image.Image], window: Window | None) -> Image.Image:
    return load_image(source() if callable(source) else source, window)


def _object(item: Item, size: tuple[int, int]) -> Image.Image:
    """The object's pixels white on black, of the image's size (width, height)."""
    if item.mask is not None:
        if isinstance(item.mask, Tensor):
            raise ValueError(f"mask: expected a picture or a file for the picture {item.key}, got a tensor")
        with Image.open(item.mask) if isinstance(item.mask, Path) else nullcontext(item.mask) as mask:
            if mask.size != size:
                raise ValueError(f"mask: expected the size {size} of the image {item.key}, got {mask.size}")
            values = np.asarray(mask)  # of any mode: one bit, grey, numbers of a palette, colour
        colours = values.shape[-1] - (mask.mode in ("LA", "RGBA", "PA")) if values.ndim == 3 else 0
        inside = values > 0 if values.ndim == 2 else values[..., :colours].max(-1) > 0  # without alpha
        return Image.fromarray(inside.astype(np.uint8) * 255)
    assert item.box is not None
    x0, y0, x1, y1 = item.box
    drawn = Image.new("L", size)
    x0, y0 = round(x0), round(y0)
    ImageDraw.Draw(drawn).rectangle((x0, y0, max(round(x1) - 1, x0), max(round(y1) - 1, y0)), fill=255)
    return drawn


def _tensor_mask(item: Item) -> Tensor | None:
    assert isinstance(item.image, Tensor)
    height, width = item.image.shape[-2:]
    if item.mask is not None:
        if not isinstance(item.mask, Tensor) or item.mask.shape != (height, width) or item.mask.dtype != torch.bool:
            got = getattr(item.mask, "shape", type(item.mask).__name__)
            raise ValueError(f"mask: expected a bool tensor [{height}, {width}] for {item.key}, got {got}")
        return item.mask if bool(item.mask.any()) else None
    if item.box is None:
        return None
    x0, y0, x1, y1 = map(round, item.box)
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] = True
    return mask if bool(mask.any()) else None
