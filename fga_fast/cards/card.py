"""What is known of one feature of an SAE: its card, as JSON can hold it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch

from fga_fast.metrics.correlation import pearson, spearman


@dataclass(frozen=True)
class Example:
    """One of a feature's strongest images."""

    key: str  # of the image in the harvest
    code: float  # at the strongest patch
    patch: tuple[int, int]  # row, column
    target: str | None = None  # the predicted class, whose logit the next two are about
    target_number: int | None = None
    predicted: float | None = None  # the feature's contribution to it, by the gradient; None: it has none
    measured: float | None = None  # what it adds in truth: what the logit loses with the feature at 0
    error: str = ""  # why the image cannot be read, or has no effect here
    picture: bytes = field(default=b"", repr=False)  # a JPEG file, see evidence.py


class Push(NamedTuple):
    """What a feature adds to the logit of a class."""

    number: int
    name: str
    value: float


class Class(NamedTuple):
    """A class among the images in which a feature is active."""

    number: int
    name: str
    share: float  # of these images
    usual: float  # of all images


class Company(NamedTuple):
    """A feature that is active in the same patches."""

    feature: int
    name: str  # that a person gave it
    jaccard: float  # tokens with both / tokens with one of them
    share: float  # of the card's feature's tokens


@dataclass(frozen=True)
class Card:
    """What is known of one feature.

    Attributes:
        density: share of the patches in which it is active. images: share of the images.
        mean, largest: of its codes where it is active.
        histogram: (from, to, patches) by strength, without empty ends.
        company: features that are active in the same patches, most alike first.
        classes: of the images in which it is active, the share that the model predicts as each class. First those with
            the largest difference from all images.
        pushes: what the feature adds to the logits of classes, mean over the examples: what they lose without it. The
            largest first; below 0 the feature speaks against the class.
    """

    block: int
    feature: int
    name: str
    note: str
    density: float
    images: float
    mean: float
    largest: float
    histogram: tuple[tuple[float, float, int], ...]
    company: tuple[Company, ...]
    classes: tuple[Class, ...]
    pushes: tuple[Push, ...]
    examples: tuple[Example, ...]


class Agreement(NamedTuple):
    """How well contributions predict what is measured."""

    pairs: int
    pearson: float
    spearman: float


def pairs_of(cards: Sequence[Card]) -> list[tuple[float, float]]:
    """Contribution and measurement of all examples that have both, as finite numbers."""
    pairs = [
        (one.predicted, one.measured)
        for card in cards
        for one in card.examples
        if one.predicted is not None and one.measured is not None
    ]
    return [pair for pair in pairs if all(map(math.isfinite, pair))]


def agreement_of(cards: Sequence[Card]) -> Agreement | None:
    """The correlations of contributions and measurements over all examples; None for fewer than three, and where one
    of them is the same everywhere.
    """
    pairs = pairs_of(cards)
    if len(pairs) < 3:
        return None
    a, b = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    found = Agreement(len(pairs), float(pearson(a, b)), float(spearman(a, b)))
    return found if all(map(math.isfinite, found)) else None


def to_json(cards: Sequence[Card], agreement: Agreement | None, told: Mapping[str, Any]) -> bytes:
    """cards.json."""
    entries: list[dict[str, Any]] = []
    for card in cards:
        entry = asdict(card)
        for example in entry["examples"]:
            del example["picture"]
        entry |= {name: [one._asdict() for one in getattr(card, name)] for name in ("company", "classes", "pushes")}
        entries.append(entry)
    whole = {**told, "agreement": None if agreement is None else agreement._asdict(), "features": entries}
    return (json.dumps(_finite(whole), indent=1, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor Inf."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
