"""The images on which one method gains most and least over another, with the maps of both."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fga_fast.evaluation.group import grid_of, square
from fga_fast.evaluation.items import Item, load, view_of
from fga_fast.evaluation.statistics import gains, pivot
from fga_fast.evaluation.subject import Method, Subject
from fga_fast.io.images import Preprocess
from fga_fast.io.window import Window
from fga_fast.result.heatmap import paint

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
    pair = (*methods,)
    found = pivot(table)
    metric = (
        next((name for name, values in found.items() if {*pair} <= {*values.of}), None) if metric is None else metric
    )
    if metric is None:
        return []
    gain = gains(found[metric], (pair[0], pair[1]), higher[metric])
    order = [int(place) for place in np.argsort(-gain, kind="stable") if np.isfinite(gain[place])]
    count = min(count, len(order) // 2)
    # Tables keep what was explained, also where it was the predicted class.
    asked = dict(zip(table.column("key").to_pylist(), table.column("target").to_pylist(), strict=True))
    by_unit: dict[str, Item] = {}
    for item in items:
        if asked.get(item.key) is not None:
            by_unit.setdefault(item.unit, item)
    chosen = [(place, True) for place in order[:count]] + [(place, False) for place in order[::-1][:count]]
    made = []
    for place, best in chosen:
        item = by_unit[found[metric].images[place]]
        pictures = _pictures(item, asked[item.key], [*methods.values()], subject, preprocess, window)
        made.append(
            Example(
                item.unit, class_name(asked[item.key]), float(gain[place]), best, metric, (pair[0], pair[1]), pictures
            )
        )
    return made


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
    painted = paint(relevance.float(), grid, picture[None], "turbo", 0.55, centred=signed)
    return Image.fromarray(painted[0].numpy())


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
