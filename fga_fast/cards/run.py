"""Feature cards: what each feature of an SAE stands for, as a page to browse and as JSON.

A card has the feature's strongest images, how often and how strongly it is active, its company, and what it does to the
model: the logit that is lost without it, measured, beside what the gradient predicts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from fga_fast.cards.card import Card, Class, Company, Example, Push, agreement_of, to_json
from fga_fast.cards.census import Census, bin_edges, take_census
from fga_fast.cards.effects import Effects, effects
from fga_fast.cards.evidence import evidence
from fga_fast.cards.page import cards_page
from fga_fast.dataset.ahead import read_ahead
from fga_fast.dataset.items import Item, load, view_of
from fga_fast.harvest.activations import Activations
from fga_fast.harvest.source import Source, source_of
from fga_fast.io.atomic import atomic_write, check_writable_folder
from fga_fast.io.images import Preprocess
from fga_fast.io.window import Window
from fga_fast.models import checks
from fga_fast.models.layout import ModelLayout
from fga_fast.question.names import whole_label
from fga_fast.result.explanation import Explanation
from fga_fast.sae.notes import Note, Notes
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder

logger = logging.getLogger(__name__)

PAGE, JSON = "cards.html", "cards.json"
_MOST_TABLE = 2**20  # entries of the table of company that is made for all features at once
_COMPANY = 5
_CLASSES = 4
_NEAR, _NEAR_LOW = 0.02, 0.1  # difference of codes of the same image, relative; in 16 bits
_OTHER = "not the image of the harvest (file changed, or another --window); its effect is left out"


def feature_cards(
    model: nn.Module, saes: Mapping[int, SparseAutoencoder], activations: Activations, *, out: str | Path,
    features: Mapping[int, Sequence[int]] | None = None, min_density: float = 0.001, limit: int = 100,
    examples: int = 6, items: Sequence[Item] = (), class_names: Sequence[str] | None = None,
    notes: Notes | None = None, layout: ModelLayout | None = None, window: Window | None = None,
    progress: bool = True,
) -> Path:  # fmt: skip
    """Writes cards.html and cards.json.

    The harvest is read once for each block (twice if all features of a very wide SAE are asked for). Then the model
    runs twice on each example, with two backward passes. Memory does not grow with the images.

    Args:
        model: the model of the harvest, in eval mode. Not changed.
        saes: block -> SAE, blocks that were harvested.
        activations: the harvest.
        out: folder to write into; made if it is missing.
        features: block -> features that get a card. None: those that are active in a share of at least `min_density` of
            the patches; of more than `limit` of a block those with the largest sum of codes.
        examples: images on a card.
        items: images of the harvest that are no files, such as those of a Hugging Face dataset.
        class_names: one for each class.
        notes: names and notes of features.
        layout: where the model's blocks are; None: `find_layout(model)`.
        window: how values of more than 8 bits are read, see `load_image`.
        progress: show bars.

    Returns:
        The path of cards.html.

    Raises:
        TypeError, ValueError: an argument does not fit, or the harvest is of another model.
        OSError: `out` cannot be written.
    """
    about = activations.about
    _check(saes, activations, features, limit, examples)
    activations.check_model(model)
    preprocess = None if about.preprocess is None else _preprocess(about.preprocess)
    source = source_of(model, list(saes), layout, about.image_size, preprocess)
    checks.check_saes(saes, source.layout, source.like)
    out = check_writable_folder(out)
    known = _Known(activations, source, preprocess, window, items, class_names, dict(notes or {}))
    cards: list[Card] = []
    for block, sae in sorted(saes.items()):
        asked = None if features is None else sorted({*features.get(block, ())})
        if asked == []:
            continue
        census, chosen = _counted(activations, block, sae, asked, min_density, limit, examples, progress)
        cards += known.cards(block, sae, census, chosen, progress)
    if not cards:
        raise ValueError(
            f"min_density: expected some features that are active in {min_density:g} of the patches, got none; lower it"
        )
    told = {"model": about.model, "model_checksum": about.model_checksum, "images": about.images}
    agreement = agreement_of(cards)
    atomic_write(out / JSON, to_json(cards, agreement, told))
    title = f"Features of {about.model}" if about.model else "Features"
    return atomic_write(out / PAGE, cards_page(title, cards, agreement, told).encode("utf-8", "replace"))


def features_of(explanation: Explanation) -> dict[int, list[int]]:
    """Block -> the features that an explanation lists for its images, to make cards of."""
    return {block: sorted({*top.image_index.flatten().tolist()} - {-1}) for block, top in explanation.features.items()}


def _check(
    saes: Mapping[int, SparseAutoencoder], activations: Activations, features: Mapping[int, Sequence[int]] | None,
    limit: int, examples: int,
) -> None:  # fmt: skip
    for name, number in (("limit", limit), ("examples", examples)):
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    if not saes:
        raise ValueError("saes: expected block -> SAE, got none")
    blocks = activations.about.blocks
    for block in saes:
        if block not in blocks:
            raise ValueError(f"saes: expected blocks of the harvest ({', '.join(map(str, blocks))}), got {block}")
    if features is not None and not any(features.values()):
        raise ValueError("features: expected at least one feature, got none; leave the argument out for all")
    for block, chosen in (features or {}).items():
        if block not in saes:
            raise ValueError(f"features: expected blocks with an SAE ({', '.join(map(str, saes))}), got {block}")
        wrong = [one for one in chosen if not 0 <= one < saes[block].d_sae]
        if wrong:
            raise ValueError(f"features[{block}]: expected 0 to {saes[block].d_sae - 1}, got {wrong[0]}")


def _preprocess(told: Mapping[str, Any]) -> Preprocess:
    """From JSON, whose lists are tuples here."""
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
    try:
        return Preprocess(**fields)
    except TypeError as error:
        raise ValueError(f"activations: the harvest's preprocess {dict(told)} is not one of this version") from error


def _counted(
    activations: Activations, block: int, sae: SparseAutoencoder, asked: list[int] | None, min_density: float,
    limit: int, examples: int, progress: bool,
) -> tuple[Census, list[int]]:  # fmt: skip
    """A census that watches the chosen features, and these."""
    if asked is not None:
        return take_census(activations, block, sae, strongest=examples, watched=asked, progress=progress), asked
    small = sae.d_sae**2 <= _MOST_TABLE
    census = take_census(
        activations, block, sae, strongest=examples, watched=None if small else [], progress=progress
    )  # fmt: skip
    dense = (census.density >= max(min_density, 1e-300)).nonzero().flatten()
    largest = census.total[dense].abs().argsort(descending=True, stable=True)[:limit]
    chosen: list[int] = dense[largest].sort().values.tolist()
    if len(dense) > limit:
        logger.info("block %d: cards for %d of %d features; raise limit for more", block, limit, len(dense))
    if small or not chosen:
        return census, chosen
    return take_census(activations, block, sae, strongest=examples, watched=chosen, progress=progress), chosen


class _Read(NamedTuple):
    """An image of a card, or why it is missing."""

    view: Image.Image | None
    image: Tensor | None  # [channels, H, W]
    error: str


@dataclass
class _Known:
    """What all cards are made from."""

    activations: Activations
    source: Source
    preprocess: Preprocess | None
    window: Window | None
    items: Sequence[Item]
    class_names: Sequence[str] | None
    notes: Notes

    def cards(
        self, block: int, sae: SparseAutoencoder, census: Census, chosen: Sequence[int], progress: bool
    ) -> Iterator[Card]:
        """The cards of one block."""
        own = {item.key: item for item in self.items}
        keys, paths = self.activations.keys, self.activations.paths
        places = {int(feature): place for place, feature in enumerate(census.watched.tolist())}
        numbers = [[one for one in census.image[:, feature].tolist() if one >= 0] for feature in chosen]
        groups = [[own.get(keys[one]) or Item(keys[one], paths[one] or _missing) for one in group] for group in numbers]
        reading = read_ahead(groups, self._read)
        desc = f"cards of block {block}"
        for feature, group, read in tqdm(
            zip(chosen, numbers, reading, strict=True), total=len(chosen), unit="card", desc=desc, disable=not progress
        ):
            examples, lost = self._examples(block, sae, census, feature, group, read, keys)
            yield self._card(block, census, feature, places[feature], examples, lost)

    def _read(self, item: Item) -> _Read:
        try:
            return _Read(
                view_of(item, self.preprocess, self.window), load(item, self.preprocess, self.window).image, ""
            )
        except Exception as error:  # whatever a file, or a user's function, does
            return _Read(None, None, f"cannot be read: {type(error).__name__}: {error}")

    def _examples(
        self, block: int, sae: SparseAutoencoder, census: Census, feature: int, numbers: list[int],
        read: list[_Read], keys: Sequence[str],
    ) -> tuple[list[Example], Tensor | None]:  # fmt: skip
        """Examples, strongest first, and what the logits lose without the feature, [n, classes]."""
        grid = self.activations.about.grid
        patches = census.patch[: len(numbers), feature].tolist()
        stored = census.code[: len(numbers), feature].cpu()
        good = [place for place, one in enumerate(read) if one.image is not None]
        found: Effects | None = None
        same = torch.zeros(0, dtype=torch.bool)
        if good:
            images = torch.stack([image for one in read if (image := one.image) is not None])
            found = effects(self.source, sae, block, images, [feature] * len(good), [patches[one] for one in good])
            same = (found.code - stored[good]).abs() <= self._near() * stored[good].abs()
        made = []
        for place, number in enumerate(numbers):
            row, error = good.index(place) if place in good else None, read[place].error
            if row is not None and not same[row]:
                row, error = None, _OTHER
            drive = None if found is None or row is None or found.drive is None else found.drive[row]
            with torch.no_grad():
                x = self.activations.read(block, number, number + 1)[0].to(sae.device, sae.dtype)
                activity = sae.encode(x)[:, feature].cpu()
            picture = evidence(read[place].view, activity, grid, patches[place], drive)
            at = (patches[place] // grid[1], patches[place] % grid[1])
            told = {} if found is None or row is None else self._told(found, row)
            made.append(Example(keys[number], float(stored[place]), at, **told, error=error, picture=picture))
        return made, None if found is None or found.lost is None or not same.any() else found.lost[same]

    def _near(self) -> float:
        low = self.activations.about.dtype == "bfloat16" or self.source.like.dtype.itemsize == 2
        return _NEAR_LOW if low else _NEAR

    def _told(self, found: Effects, row: int) -> dict[str, Any]:
        if found.target is None or found.measured is None:
            return {}
        number = int(found.target[row])
        return {
            "target": whole_label(number, self.class_names),
            "target_number": number,
            "predicted": None if found.predicted is None else float(found.predicted[row]),
            "measured": float(found.measured[row]),
        }

    def _card(
        self, block: int, census: Census, feature: int, place: int, examples: list[Example], lost: Tensor | None
    ) -> Card:
        note = self.notes.get((block, feature), Note(""))
        active = int(census.active[feature])
        return Card(
            block, feature, note.name, note.note, float(census.density[feature]),
            int(census.lit[feature]) / census.images, float(census.total[feature]) / max(active, 1),
            float(census.code[0, feature]), _histogram(census.histogram[feature]),
            self._company(block, census, feature, place), self._classes(census.classes[place], census.lit[feature]),
            () if lost is None else self._pushes(lost.double().mean(0)), tuple(examples),
        )  # fmt: skip

    def _company(self, block: int, census: Census, feature: int, place: int) -> tuple[Company, ...]:
        both, own = census.together[place].double(), census.active[feature].double()  # [F], []
        alike = both / (own + census.active - both).clamp_min(1)
        alike[feature] = 0
        order = alike.argsort(descending=True, stable=True)[:_COMPANY].tolist()
        return tuple(
            Company(
                one, self.notes.get((block, one), Note("")).name, float(alike[one]), float(both[one] / own.clamp_min(1))
            )
            for one in order
            if alike[one] > 0
        )

    def _classes(self, counts: Tensor, lit: Tensor) -> tuple[Class, ...]:  # [K], []
        if not len(counts):
            return ()
        predicted = self.activations.predicted
        usual = predicted[predicted >= 0].bincount(minlength=len(counts)).double() / len(predicted)
        shares = counts.double().cpu() / max(int(lit), 1)
        order = (shares - usual).argsort(descending=True, stable=True)[:_CLASSES].tolist()
        return tuple(
            Class(one, whole_label(one, self.class_names), float(shares[one]), float(usual[one]))
            for one in order
            if shares[one]
        )

    def _pushes(self, lost: Tensor) -> tuple[Push, ...]:  # [classes]
        order = lost.argsort(descending=True, stable=True).tolist()
        ends = order if len(order) <= 2 * _CLASSES else [*order[:_CLASSES], *order[-_CLASSES:]]
        return tuple(Push(one, whole_label(one, self.class_names), float(lost[one])) for one in ends)


def _missing() -> Image.Image:
    raise FileNotFoundError("the image was no file; give items")


def _histogram(counts: Tensor) -> tuple[tuple[float, float, int], ...]:  # [BINS]
    there = counts.nonzero().flatten().tolist()
    if not there:
        return ()
    edges = bin_edges().tolist()
    return tuple((edges[one], edges[one + 1], int(counts[one])) for one in range(there[0], there[-1] + 1))
