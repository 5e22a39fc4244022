"""Runs a model and SAEs on images, twice, and adds up what `run.py` makes numbers of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from fga_fast.dataset.ahead import read_ahead
from fga_fast.dataset.items import Item, check_items, load
from fga_fast.engine.streams import Edit, edited
from fga_fast.io.images import Preprocess
from fga_fast.io.window import Window
from fga_fast.models import checks
from fga_fast.models.find import find_layout
from fga_fast.models.layout import ModelLayout
from fga_fast.quality.behaviour import Output, sums_of
from fga_fast.quality.sums import CodeSums, Spread, reconstruct
from fga_fast.question.readout import Readout
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder

Images: TypeAlias = "Sequence[Item] | Tensor"


class Picture(NamedTuple):
    """An image, and the classes that items name for it."""

    key: str
    item: Item
    classes: frozenset[int]


class Errors(NamedTuple):
    """Images that were left out, with the reason."""

    found: list[tuple[str, str]]

    def add(self, picture: Picture, error: Exception) -> None:
        """Notes one."""
        self.found.append((picture.key, f"{type(error).__name__}: {error}"))


@dataclass(frozen=True)
class Plan:
    """What runs, checked."""

    model: nn.Module
    layout: ModelLayout
    readout: Readout
    saes: Mapping[str, tuple[int, SparseAutoencoder]]
    like: Tensor  # a weight of the model
    read: Callable[[Item], Tensor | Exception]
    output: Output | None
    batch_size: int

    @property
    def blocks(self) -> list[int]:
        """The blocks of the SAEs, each once."""
        return sorted({block for block, _ in self.saes.values()})

    def run(self, images: Tensor, edits: Mapping[int, Edit]) -> Tensor:
        """The model's output [B, classes or E] with some streams seen or replaced."""
        with edited(self.layout, edits, len(images)):
            return self.readout.run(images)

    def check(self, values: Tensor, what: str, images: Tensor) -> Tensor:
        """The values, without NaN and Inf; else ValueError names the cause."""
        checks.check_finite(values, what, self.model, images)
        return values

    def with_patches(self, images: Tensor, block: int, patches: Tensor) -> Tensor:  # [B, P, C] or [C]
        """The model's output with these tokens in the place of the patches' after a block."""

        def put(x: Tensor) -> Tensor:
            first = x[:, : self.layout.prefix_tokens]
            return torch.cat([first, patches.to(x.dtype).expand_as(self.patches(x))], 1)

        return self.check(self.run(images, {block: put}), f"the output with other patches after block {block}", images)

    def patches(self, x: Tensor) -> Tensor:  # [B, N, C] -> [B, P, C]
        """The tokens of patches."""
        return x[:, self.layout.prefix_tokens :]

    def seen(self, images: Tensor) -> tuple[dict[int, Tensor], Tensor]:
        """The patches' streams [B, P, C] after the SAEs' blocks, and the output, of the model as it is."""
        streams: dict[int, Tensor] = {}

        def keep(block: int) -> Edit:
            # A copy, since the model may go on with the same memory.
            return lambda x: streams.__setitem__(block, self.patches(x).clone())

        output = self.run(images, {block: keep(block) for block in self.blocks})
        for block, x in streams.items():
            self.check(x, f"the residual stream after block {block}", images)
        return streams, self.check(output, "the model's output", images)


def make_plan(
    model: nn.Module, saes: Mapping[str, tuple[int, SparseAutoencoder]], layout: ModelLayout | None,
    preprocess: Preprocess | None, window: Window | None, output: Output | None, batch_size: int,
) -> Plan:  # fmt: skip
    """A plan, after checking that its parts fit each other; `quality.run.compare` says what the arguments are."""
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if output not in (None, "softmax", "sigmoid", "features"):
        raise ValueError(f"output: expected softmax, sigmoid, features or None, got {output!r}")
    if not saes:
        raise ValueError("saes: expected at least one SAE, got none")
    layout = find_layout(model) if layout is None else layout
    checks.check_layout(layout, model)
    checks.check_weights(model, layout)
    checks.check_eval(model)
    like = checks.typical_weight(model, layout)
    for block, sae in saes.values():
        checks.check_saes({block: sae}, layout, like)

    def read(item: Item) -> Tensor | Exception:
        try:
            return load(item, preprocess, window).image
        except Exception as error:
            return error

    return Plan(model, layout, Readout(model, layout=layout), dict(saes), like.detach(), read, output, batch_size)


def pictures_of(images: Images) -> list[Picture]:
    """The images, each once, with all classes that items name for it.

    Raises:
        TypeError, ValueError: no images, two with the same key, or a tensor of another shape.
    """
    if isinstance(images, Tensor):
        if images.dim() != 4:
            raise ValueError(f"images: expected [I, channels, H, W], got {list(images.shape)}")
        images = [Item(str(place), image) for place, image in enumerate(images)]
    items = list(images)
    if not all(isinstance(item, Item) for item in items):
        raise TypeError("images: expected items of fga_fast.dataset, or a tensor [I, channels, H, W]")
    check_items(items)
    found: dict[object, Picture] = {}
    for item in items:
        same = id(item.image) if not hasattr(item.image, "__fspath__") else item.image
        classes = frozenset() if item.target is None else frozenset((item.target,))
        known = found.get(same)
        picture = Picture(item.key, item, classes)
        found[same] = picture if known is None else known._replace(classes=known.classes | classes)
    return list(found.values())


class OutputError(ValueError):
    """The outputs are not what the caller said, whatever the image."""


class Means:
    """First pass: the mean of the patches' tokens after each block, and what the model's outputs are."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.output: Output = plan.output or "features"
        self._sums: dict[int, Tensor] = {}
        self._tokens = 0

    def add(self, pictures: Sequence[Picture], images: Tensor) -> None:
        """Adds a batch."""
        streams, output = self.plan.seen(images)
        classes = self.plan.readout.predicted(output) is not None
        if self.plan.output is None:
            self.output = "softmax" if classes else "features"
        elif self.output != "features" and not classes:
            raise OutputError(f"output: expected features for a model without classes, got {self.output}")
        _truth(pictures, output, self.output)  # so that a wrong class is no part of the means either
        self._tokens += len(images) * self.plan.layout.patches
        for block, x in streams.items():
            self._sums[block] = self._sums.get(block, 0) + x.double().sum((0, 1))

    def of(self, block: int) -> Tensor:
        """[C] float64."""
        return self._sums[block] / self._tokens


class Sums:
    """Second pass: everything else."""

    def __init__(self, plan: Plan, means: Means) -> None:
        self.plan, self._means = plan, means
        self.images = self.known = 0
        self.output = means.output
        self.spreads: dict[int, Spread] = {}  # by block
        self.codes: dict[str, CodeSums] = {}  # by SAE
        self.effects: dict[str, Tensor] = {}  # by SAE, [3, 4] of `behaviour.sums_of`

    def add(self, pictures: Sequence[Picture], images: Tensor) -> None:
        """Adds a batch, or nothing if something of it fails."""
        plan = self.plan
        streams, plain = plan.seen(images)
        truth = _truth(pictures, plain, self.output)
        empty = {block: plan.with_patches(images, block, self._means.of(block)) for block in streams}
        codes, effects = {}, {}
        for name, (block, sae) in plan.saes.items():
            found, codes[name] = reconstruct(sae, streams[block])
            plan.check(found, f"the reconstruction of {name}", images)
            spliced = plan.with_patches(images, block, found)
            effects[name] = sums_of((plain, spliced, empty[block]), self.output, truth)
        spreads = {block: Spread.of(x) for block, x in streams.items()}
        # Nothing below fails.
        self.images += len(images)
        self.known += int(truth.any(1).sum())
        for block, spread in spreads.items():
            self.spreads[block] = self.spreads[block].merged(spread) if block in self.spreads else spread
        for name in plan.saes:
            self.codes[name] = self.codes[name].merged(codes[name]) if name in self.codes else codes[name]
            self.effects[name] = self.effects.get(name, 0) + effects[name]


def each(
    plan: Plan, pictures: Sequence[Picture], add: Callable[[Sequence[Picture], Tensor], None], errors: Errors,
    done: Callable[[int], object],
) -> list[Picture]:  # fmt: skip
    """Gives the images to `add` in batches; those of a batch that fails, one by one. Returns those that did well."""
    good: list[Picture] = []
    groups = [pictures[start : start + plan.batch_size] for start in range(0, len(pictures), plan.batch_size)]
    reads = read_ahead(([picture.item for picture in group] for group in groups), plan.read)
    for group, read in zip(groups, reads, strict=True):
        ready = []
        for picture, image in zip(group, read, strict=True):
            if isinstance(image, Exception):
                errors.add(picture, image)
            else:
                ready.append((picture, image))
        good += _add(plan, ready, add, errors)
        done(len(group))
    return good


def _add(
    plan: Plan, ready: Sequence[tuple[Picture, Tensor]], add: Callable[[Sequence[Picture], Tensor], None],
    errors: Errors,
) -> list[Picture]:  # fmt: skip
    if not ready:
        return []
    pictures = [picture for picture, _ in ready]
    try:
        images = torch.stack([image for _, image in ready]).to(plan.like)
        checks.check_images(images, plan.layout.in_chans, plan.layout.image_size, plan.like)
        add(pictures, checks.plain(images))
    except OutputError:
        raise
    except Exception as error:  # models raise what they like
        if len(ready) == 1:
            errors.add(pictures[0], error)
            return []
    else:
        return pictures
    return [picture for one in ready for picture in _add(plan, [one], add, errors)]


def _truth(pictures: Sequence[Picture], output: Tensor, kind: Output) -> Tensor:
    """[B, classes] bool, the classes that are known; none for features."""
    truth = torch.zeros(output.shape, dtype=torch.bool, device=output.device)
    if kind == "features":
        return truth
    for row, picture in enumerate(pictures):
        for number in picture.classes:
            if not 0 <= number < output.shape[1]:
                raise ValueError(f"target: expected a class from 0 to {output.shape[1] - 1}, got {number}")
            truth[row, number] = True
    return truth
