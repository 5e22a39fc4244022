"""The rows of one group of images: maps of all methods, then all metrics.

What fails for a group is tried again image by image, so that one image does not cost the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from fga_fast.dataset.items import Item, Loaded, half_of
from fga_fast.evaluation.measures import Batch, Measure
from fga_fast.evaluation.store import Row
from fga_fast.evaluation.subject import Method, Subject
from fga_fast.metrics.checks import Variant
from fga_fast.metrics.perturb import Probability
from fga_fast.models.find import find_layout

Answer = TypeVar("Answer")
Measured: TypeAlias = dict[str, float]  # metric -> value


class Failure(NamedTuple):
    """Why there is no answer."""

    reason: str


class Plan(NamedTuple):
    """What is run, checked."""

    subjects: Mapping[int, Subject]  # by seed; kept, since methods keep in them what they need again
    methods: Mapping[str, Method]
    measures: Mapping[str, Measure]
    grid: tuple[int, int] | None
    variant: Variant
    probability: Probability
    perturbed: int  # images in a forward pass of a metric
    like: Tensor  # of the images' dtype and device

    @property
    def subject(self) -> Subject:
        """The subject, with the first seed."""
        return next(iter(self.subjects.values()))


def grid_of(subject: Subject) -> tuple[int, int] | None:
    """The patches' grid of a model that is known; methods of the user may explain others."""
    if subject.layout is not None:
        rows, columns = subject.layout.grid
        return rows, columns
    try:
        return find_layout(subject.model).grid
    except ValueError:
        return None


def rows_of(plan: Plan, group: Sequence[Item], loaded: Sequence[Loaded | Failure]) -> list[Row]:
    """All rows of a group, item by item."""
    rows: dict[int, list[Row]] = {place: [] for place in range(len(group))}
    readable = {place: one for place, one in enumerate(loaded) if isinstance(one, Loaded)}
    asked = _tolerant(lambda members: targets_of(plan, [(group[m], readable[m]) for m in members]), [*readable])
    targets = {member: target for member, target in asked.items() if isinstance(target, int)}
    for place, item in enumerate(group):
        failure = asked.get(place, loaded[place])
        if isinstance(failure, Failure):
            rows[place].append(_row(next(iter(plan.subjects)), item, None, None, None, failure))
    for seed in plan.subjects:
        _add(plan, seed, group, readable, targets, rows)
    return [row for place in range(len(group)) for row in rows[place]]


def _add(
    plan: Plan, seed: int, group: Sequence[Item], loaded: Mapping[int, Loaded], targets: Mapping[int, int],
    rows: Mapping[int, list[Row]],
) -> None:  # fmt: skip
    """Adds the rows of one seed, for the members of a group that have a target."""

    def note(member: int, method: str | None, metric: str | None, value: float | Failure) -> None:
        rows[member].append(_row(seed, group[member], targets[member], method, metric, value))

    maps: dict[int, dict[str, Tensor]] = {member: {} for member in targets}  # relevance [P]
    images = {member: loaded[member].image for member in targets}
    for name in plan.methods:
        for member, relevance in maps_of(plan, name, seed, images, targets).items():
            if isinstance(relevance, Failure):
                note(member, name, None, relevance)
            else:
                maps[member][name] = relevance
    mapped = [member for member in targets if maps[member]]
    for metric, measure in plan.measures.items():
        members = [m for m in mapped if loaded[m].mask is not None] if measure.needs_mask else mapped

        def ask(members: list[int], measure: Measure = measure) -> list[list[Measured | Failure]]:
            asked = [(group[m].key, loaded[m], targets[m], maps[m]) for m in members]
            return _measured(plan, measure, seed, asked)

        for member, values in _tolerant(ask, members).items():
            if isinstance(values, Failure):
                note(member, None, metric, values)
                continue
            for method, found in zip(plan.methods, values, strict=True):
                if method not in maps[member]:
                    continue
                if isinstance(found, Failure):
                    note(member, method, metric, found)
                    continue
                for column, value in found.items():
                    note(member, method, column, value)


def maps_of(
    plan: Plan, name: str, seed: int, images: Mapping[int, Tensor], targets: Mapping[int, int]
) -> dict[int, Tensor | Failure]:  # member -> relevance [P] float64
    """The maps of a method for the members that have a target, of their images [channels, H, W]."""

    def explain(members: list[int]) -> list[Tensor | Failure]:
        batch = torch.stack([images[m] for m in members]).to(plan.like)
        picked = torch.tensor([targets[m] for m in members], device=batch.device)
        return _checked(plan.methods[name](plan.subjects[seed], batch, picked), len(members), plan.grid)

    return _tolerant(explain, [*targets])


def _measured(
    plan: Plan, measure: Measure, seed: int, asked: Sequence[tuple[str, Loaded, int, Mapping[str, Tensor]]]
) -> list[list[Measured | Failure]]:
    """Values by metric of each item and method. An item: its key, what was read, its target, its maps by method."""
    keys, loaded, targets, maps = zip(*asked, strict=True)
    # A method that failed is stood in for by one that did not, which costs no forward pass; nobody reads the value.
    filled = torch.stack(
        [torch.stack([one.get(name, next(iter(one.values()))) for one in maps]) for name in plan.methods]
    )
    masks = torch.stack([one.mask for one in loaded]).to(filled.device) if measure.needs_mask else None
    grid = square(filled.shape[2]) if plan.grid is None else plan.grid
    images = torch.stack([one.image for one in loaded]).to(plan.like)
    picked = torch.tensor(targets, device=images.device)
    failed: dict[tuple[int, str], Failure] = {}  # by item and method

    def explain(pixels: Tensor) -> Tensor:  # [b, channels, H, W] -> [M, b, P]
        again = filled.clone()
        for number, name in enumerate(plan.methods):
            able = {one: targets[one] for one in range(len(maps)) if name in maps[one] and (one, name) not in failed}
            for one, relevance in maps_of(plan, name, seed, dict(enumerate(pixels)), able).items():
                if isinstance(relevance, Failure):
                    failed[one, name] = relevance
                else:
                    again[number, one] = relevance
        return again

    batch = Batch(
        plan.subject.model, images, picked, filled, masks, grid, keys, seed, plan.variant, plan.probability,
        plan.perturbed, explain,
    )  # fmt: skip
    found = measure.run(batch)
    if {*found} != {*measure.higher} or any(values.shape != filled.shape[:2] for values in found.values()):
        got = {name: [*values.shape] for name, values in found.items()}
        raise ValueError(f"metrics: expected {', '.join(measure.higher)} of shape {[*filled.shape[:2]]}, got {got}")
    numbers = {name: values.double().tolist() for name, values in found.items()}  # [M][b] each
    return [
        [
            failed.get((one, method)) or {name: values[number][one] for name, values in numbers.items()}
            for number, method in enumerate(plan.methods)
        ]
        for one in range(len(keys))
    ]


def targets_of(plan: Plan, members: Sequence[tuple[Item, Loaded]]) -> list[int | Failure]:
    """The class to explain of each member: the given one, or the predicted one."""
    images = torch.stack([loaded.image for _, loaded in members]).to(plan.like)
    with torch.no_grad():
        output = plan.subject.model(images)
    logits: Tensor = getattr(output, "logits", output)  # Hugging Face models return an object
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise TypeError("model: expected logits [B, classes]; wrap the model in a module that returns them")
    found: list[int | Failure] = []
    for (item, _), row in zip(members, logits, strict=True):
        if not bool(torch.isfinite(row).all()):
            found.append(Failure("model: gave NaN or Inf for the image; check its pixels and the model's weights"))
        elif item.target is not None and not 0 <= item.target < len(row):
            found.append(Failure(f"target: expected a class from 0 to {len(row) - 1}, got {item.target}"))
        else:
            found.append(int(row.argmax()) if item.target is None else item.target)
    return found


def _checked(relevance: Tensor, count: int, grid: tuple[int, int] | None) -> list[Tensor | Failure]:
    """Relevance [P] of each of `count` images."""
    want = f"[{count}, {'patches' if grid is None else grid[0] * grid[1]}]"
    if not isinstance(relevance, Tensor):
        raise TypeError(f"method: expected a tensor {want}, got {type(relevance).__name__}")
    patches = relevance.shape[-1] if grid is None else grid[0] * grid[1]
    if relevance.shape != (count, patches):
        raise ValueError(f"method: expected relevance {want}, got {list(relevance.shape)}; give one number a patch")
    found = relevance.detach().double()
    failure = Failure("method: gave NaN or Inf as relevance; look for the cause in the method")
    return [one if bool(torch.isfinite(one).all()) else failure for one in found]


def square(patches: int) -> tuple[int, int]:
    """The grid of a square."""
    side = round(patches**0.5)
    if side * side != patches:
        raise ValueError(f"subject: expected a layout with the grid, since {patches} patches make no square")
    return side, side


def _tolerant(
    ask: Callable[[list[int]], Sequence[Answer | Failure]], members: list[int]
) -> dict[int, Answer | Failure]:
    """Answers for members; where asking for all fails, each is asked alone."""
    if not members:
        return {}
    try:
        return dict(zip(members, ask(members), strict=True))
    except Exception as error:  # methods and metrics of users raise what they like
        if len(members) == 1:
            return {members[0]: failure_of(error)}
    return {member: _tolerant(ask, [member])[member] for member in members}


def failure_of(error: Exception) -> Failure:
    """An exception as the reason that a row gives."""
    return Failure(f"{type(error).__name__}: {error}")


def _row(
    seed: int, item: Item, target: int | None, method: str | None, metric: str | None, value: float | Failure
) -> Row:
    number, reason = (float("nan"), value.reason) if isinstance(value, Failure) else (value, None)
    return Row(item.key, item.unit, half_of(item.unit), seed, target, method, metric, number, reason)
