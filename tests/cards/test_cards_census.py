"""The census of a harvest against counts that are made feature by feature, and its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from carding import FEATURES, sae
from harvesting import PATCHES, SHARD, items, small
from torch.utils._python_dispatch import TorchDispatchMode

from fga_fast import SparseAutoencoder
from fga_fast.cards import census as module
from fga_fast.cards.census import BINS, bin_edges, take_census
from fga_fast.dataset.items import Item
from fga_fast.harvest import run as harvesting
from fga_fast.harvest.activations import Activations

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"activation": "topk", "k": 4, "normalize": "layer_norm"},
    {"activation": "topk_signed", "k": 4},
)


@pytest.fixture(scope="module")
def harvest(tmp_path_factory: pytest.TempPathFactory) -> Activations:
    return small(tmp_path_factory.mktemp("census") / "out", items(11))


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.get("activation", "relu"))
@pytest.mark.parametrize("at_once", (1, 3, 11))
def test_counts(harvest: Activations, settings: dict[str, Any], at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    own = sae(**settings)
    monkeypatch.setattr(module, "_CODES", at_once * PATCHES * FEATURES)
    watched = [8, 2, 5]
    got = take_census(harvest, 2, own, strongest=4, watched=watched, progress=False)
    codes = own.encode(harvest.read(2, 0, 11))  # [I, P, F]
    assert (got.images, got.tokens, got.watched.tolist()) == (11, 11 * PATCHES, watched)
    edges = bin_edges().tolist()
    for feature in range(FEATURES):
        here = codes[..., feature]
        flat = [float(one) for one in here.flatten() if one != 0]
        assert got.active[feature] == len(flat) and got.density[feature] == len(flat) / (11 * PATCHES)
        assert got.lit[feature] == sum(any(one != 0 for one in row.tolist()) for row in here)
        assert float(got.total[feature]) == pytest.approx(sum(flat), abs=1e-4)
        ranked = sorted(range(11), key=lambda image: (-float(here[image].abs().max()), image))
        for place, image in enumerate(ranked[:4]):
            strongest = float(here[image].abs().max())
            assert got.image[place, feature] == (image if strongest else -1)
            if strongest:
                patch = int(got.patch[place, feature])
                assert abs(float(here[image, patch])) == strongest
                assert got.code[place, feature] == here[image, patch]
        for place in range(BINS):
            inside = [one for one in flat if edges[place] <= abs(one) < edges[place + 1]]
            assert got.histogram[feature, place] == len(inside), (feature, place)
        for row, other in enumerate(watched):
            both = ((here != 0) & (codes[..., other] != 0)).sum()
            assert got.together[row, feature] == both
    for row, feature in enumerate(watched):
        lit = [bool((codes[image, :, feature] != 0).any()) for image in range(11)]
        for number in range(got.classes.shape[1]):
            wanted = sum(on and int(harvest.predicted[image]) == number for image, on in enumerate(lit))
            assert got.classes[row, number] == wanted
    assert got.active[5] == 0 or own.activation == "topk_signed"


def test_all_are_watched_unless_some_are_named(harvest: Activations) -> None:
    every = take_census(harvest, 2, sae(), progress=False)
    some = take_census(harvest, 2, sae(), watched=[3], progress=False)
    assert every.watched.tolist() == [*range(FEATURES)]
    assert torch.equal(every.together[3:4], some.together) and torch.equal(every.together.diagonal(), every.active)
    assert take_census(harvest, 2, sae(), watched=[], progress=False).together.shape == (0, FEATURES)


def test_equal_images_stand_in_their_order(tmp_path: Path) -> None:
    (one,) = items(1)
    found = small(tmp_path / "out", [Item(f"copy {number}", one.image) for number in range(6)])
    got = take_census(found, 2, sae(), strongest=4, progress=False)
    active = got.active > 0
    assert bool((got.image[:, active].t() == torch.arange(4)).all()) and bool((got.image[:, ~active] == -1).all())


class _Largest(TorchDispatchMode):
    """The largest tensor that any operator makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor):
                self.numbers = max(self.numbers, one.numel())
        return out


def test_memory_does_not_grow_with_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the largest tensor on the way nor what is kept; two images are encoded at once."""
    monkeypatch.setattr(module, "_CODES", 2 * PATCHES * FEATURES)
    sizes = []
    monkeypatch.setattr(harvesting, "SHARD_BYTES", SHARD)
    for count in (4, 16):
        found = small(tmp_path / str(count), items(count), batch_size=4)
        shards = sum(shard.bytes for shard in found.shards)
        with _Largest() as largest:
            got = take_census(found, 2, sae(), strongest=3, watched=[1, 2], progress=False)
        kept = sum(one.numel() for one in vars(got).values() if isinstance(one, torch.Tensor)) - got.classes.numel()
        sizes.append((largest.numbers, kept))
        assert shards > count * PATCHES * 16 * 4 and len(found.shards) == count // 4
    assert sizes[0] == sizes[1] and sizes[0][0] == FEATURES * BINS


def test_an_sae_of_another_width(harvest: Activations) -> None:
    other = SparseAutoencoder(torch.ones(3, 4), None, torch.ones(4, 3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"saes\[2\]: expected width 16 as the harvest's streams, got 3"):
        take_census(harvest, 2, other, progress=False)
    with pytest.raises(ValueError, match="strongest: expected at least 1 image, got 0"):
        take_census(harvest, 2, sae(), strongest=0, progress=False)
