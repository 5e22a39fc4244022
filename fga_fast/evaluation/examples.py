"""The images on which one method gains most and least over another, with the maps of both."""

from __future__ import annotations

import dataclasses
import io
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fga_fast.dataset.items import Item, load, view_of
from fga_fast.evaluation.group import grid_of, square
from fga_fast.evaluation.subject import Method, Subject
from fga_fast.io.images import Preprocess
from fga_fast.io.window import Window
from fga_fast.result.heatmap import paint

logger = logging.getLogger(__name__)

_SIDE = 224  # pixels of a picture, at least


class Example(NamedTuple):
    """One image with the maps of two methods."""

    name: str
    about: str  # what is explained
    gain: float
    best: bool  # whether it is among the images with the largest gains, else among those with the smallest
    metric: str
    methods: tuple[str, str]
    pictures: tuple[bytes, bytes, bytes]  # PNG: the image, and the overlay of each method


def examples(
    table: Any, higher: Mapping[str, bool], methods: Mapping[str, Method], subject: Subject, items: Sequence[Item], *,
    metric: str | None = None, preprocess: Preprocess | None = None, window: Window | None = None, count: int = 3,
    class_name: Callable[[int], str] = str,
) -> list[Example]:  # fmt: skip
    """The images with the largest and the smallest gain of the first of two methods over the second.

    Args:
        table: what `store.read` gives.
        higher: metric -> whether more is better.
        methods: two; their maps are computed again, for these images.
        items: those that were evaluated, or more.
        metric: whose gain counts; None: the first of the table.
        count: images of each kind, as far as there are enough.
        class_name: what a class is called.

    Raises:
        ValueError: not two methods.
    """
    if len(methods) != 2:
        raise ValueError(f"methods: expected two to compare, got {len(methods)}")
    first, second = methods
    found = _values(table, {first, second})
    known = [name for name, of in found.items() if any({*values} == {first, second} for values in of.values())]
    metric = next(iter(known), None) if metric is None else metric
    if metric not in known:
        return []
    gain = {
        key: (values[first] - values[second]) * (1 if higher[metric] else -1)
        for key, values in found[metric].items() if {*values} == {first, second}
    }  # fmt: skip
    best = sorted((item for item in items if item.key in gain), key=lambda item: -gain[item.key])
    chosen = [(item, True) for item in _one_of_each(best)], [(item, False) for item in _one_of_each(best[::-1])]
    count = min(count, len(chosen[0]) // 2)
    # Tables keep what was explained, also where it was the predicted class.
    asked = dict(zip(table.column("key").to_pylist(), table.column("target").to_pylist(), strict=True))
    subject = dataclasses.replace(subject, seed=_first_seed(table))
    made = []
    for item, is_best in (*chosen[0][:count], *chosen[1][:count]):
        try:
            pictures = _pictures(item, asked[item.key], [*methods.values()], subject, preprocess, window)
        except Exception as error:  # a report without a picture is better than none
            logger.warning("no example of %s: %s: %s", item.key, type(error).__name__, error)
            continue
        about = class_name(asked[item.key])
        made.append(Example(item.unit, about, gain[item.key], is_best, metric, (first, second), pictures))
    return made


def _values(table: Any, methods: set[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Metric -> key -> method -> value, with the first seed; without errors and NaN."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    names = ("metric", "key", "method", "value", "error", "seed")
    seed = _first_seed(table)
    for row in zip(*(table.column(name).to_pylist() for name in names), strict=True):
        metric, key, method, value, error, its = row
        if error is None and its == seed and method in methods and math.isfinite(value):
            found.setdefault(metric, {}).setdefault(key, {})[method] = value
    return found


def _first_seed(table: Any) -> int:
    return int(table.column("seed")[0].as_py()) if table.num_rows else 0


def _one_of_each(items: Sequence[Item]) -> list[Item]:
    """The first item of each image."""
    found: dict[str, Item] = {}
    for item in items:
        found.setdefault(item.unit, item)
    return list(found.values())


def _pictures(
    item: Item, target: int, methods: Sequence[Method], subject: Subject, preprocess: Preprocess | None,
    window: Window | None,
) -> tuple[bytes, bytes, bytes]:  # fmt: skip
    like = next((one for one in subject.model.parameters() if one.is_floating_point()), torch.zeros(()))
    image = load(item, preprocess, window).image.to(like)[None]
    maps = [method(subject, image, torch.tensor([target], device=image.device)).detach().cpu() for method in methods]
    view = view_of(item, preprocess, window)
    scale = max(1.0, _SIDE / min(view.size))
    size = (round(view.width * scale), round(view.height * scale))
    large = view.resize(size, Image.Resampling.BICUBIC)
    grey = np.asarray(large.convert("L").convert("RGB"))  # so that all colour is the map's
    overlays = [_overlay(one, subject, torch.tensor(grey) / 255) for one in maps]
    return _png(large), _png(overlays[0]), _png(overlays[1])


def _overlay(relevance: Tensor, subject: Subject, picture: Tensor) -> Image.Image:  # [1, P], [H, W, 3] in [0,1]
    grid = grid_of(subject) or square(relevance.shape[1])
    signed = bool((relevance < 0).any())
    painted = paint(relevance.float(), grid, picture[None], "diverging" if signed else "turbo", 0.55)
    return Image.fromarray(painted[0].numpy())


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
