"""Explanations of several, signed, named and computed targets, and of single blocks: kept, shown and drawn."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from explanations import assert_same, example
from PIL import Image

from fga_fast.result.colours import apply_colormap
from fga_fast.result.explanation import Explanation

NAMES = ("cat", "dog", "a photo of an owl on a branch", "cow", "fox", "hen", "ant")


def full(batch: int = 2, targets: int | None = 3, signed: bool = False) -> Explanation:
    plain = example(batch, targets)
    leading = plain.targets.shape
    blocks = torch.randn(*leading, 4, 12)
    relevance = blocks[..., 0, :] if signed else blocks[..., 0, :].abs()
    return replace(plain, relevance=relevance, values=torch.randn(leading), blocks=blocks, names=NAMES, start_layer=2)


def assert_same_extras(one: Explanation, other: Explanation) -> None:
    assert_same(one, other)
    assert (one.names, one.start_layer) == (other.names, other.start_layer)
    for left, right in ((one.values, other.values), (one.blocks, other.blocks)):
        assert left is not None and right is not None
        assert left.dtype == right.dtype and torch.equal(left, right)


@pytest.mark.parametrize("targets", (None, 1, 3))
def test_what_is_saved_comes_back(tmp_path: Path, targets: int | None) -> None:
    explanation = full(2, targets)
    assert_same_extras(Explanation.load(explanation.save(tmp_path / "file")), explanation)
    none = full(0, targets)
    assert_same_extras(Explanation.load(none.save(tmp_path / "empty")), none)


def test_files_without_the_newer_entries_are_read(tmp_path: Path) -> None:
    """As earlier versions wrote them."""
    path = example(2).save(tmp_path / "file")
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    about = json.loads(header["__metadata__"]["explanation"])
    del about["names"], about["start_layer"]
    header["__metadata__"]["explanation"] = json.dumps(about)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    found = Explanation.load(path)
    assert_same(found, example(2))
    assert found.names is found.values is found.blocks is None and found.start_layer == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [({"names": "cat"}, "names: expected a list, got str"), ({"names": ["cat"]}, "names: expected 7 str"),
     ({"names": [1] * 7}, "names: expected 7 str"), ({"start_layer": -1}, "start_layer: expected"),
     ({"start_layer": "2"}, "start_layer: expected"), ({"names": {"0": "cat"}}, "names: expected a list, got dict")],
)  # fmt: skip
def test_damaged_metadata_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = full().save(tmp_path / "file")
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    about = json.loads(header["__metadata__"]["explanation"]) | change
    header["__metadata__"]["explanation"] = json.dumps(about)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    with pytest.raises(ValueError, match=f"not a valid explanation: {message}"):
        Explanation.load(path)


def test_indexing_and_moving_take_everything_along() -> None:
    explanation = full(3, 2)
    one = explanation[1]
    assert one.values is not None and one.blocks is not None
    assert explanation.values is not None and explanation.blocks is not None
    assert torch.equal(one.values, explanation.values[1:2]) and torch.equal(one.blocks, explanation.blocks[1:2])
    assert (one.names, one.start_layer) == (NAMES, 2)
    moved = explanation.to("meta")
    assert moved.values is not None and moved.blocks is not None
    assert moved.values.device.type == moved.blocks.device.type == "meta"
    assert [len(each) for each in explanation] == [1, 1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(2)}, r"values: expected shape \(2, 3\) like targets, got \(2,\)"),
        ({"blocks": torch.zeros(2, 3, 12)}, r"blocks: expected shape \(2, 3, 'blocks', 12\), got \(2, 3, 12\)"),
        ({"blocks": torch.zeros(2, 3, 4, 11)}, "blocks: expected shape"),
        ({"blocks": torch.zeros(2, 3, 0, 12)}, "blocks: expected shape"),
        ({"names": ("cat",)}, "names: expected 7 str, one a column of logits, got"),
        ({"names": (1,) * 7}, "names: expected 7 str"),
        ({"start_layer": -1}, "start_layer: expected a block number from 0, got -1"),
        ({"start_layer": 1.0}, "start_layer: expected a block number"),
    ],
)
def test_extras_must_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(full(), **change)


def test_repr_names_targets() -> None:
    explanation = replace(full(2, None), targets=torch.tensor([1, 2]))
    assert "targets [dog, a photo of an owl on a …], gated" in repr(explanation)
    assert "from block 2" in repr(explanation)
    computed = replace(explanation, targets=torch.tensor([-1, -1]), names=None)
    assert "targets [function, function]" in repr(computed)
    assert "targets [1, 9]" in repr(replace(explanation, targets=torch.tensor([1, 9]), names=None))
    assert len(repr(full(400, 5))) < 350


def test_signed_relevance_in_heat_maps_and_overlays() -> None:
    explanation = full(2, 3, signed=True)
    assert bool((explanation.relevance < 0).any())
    maps = explanation.heatmap()
    assert bool((maps.amin((-2, -1)) == 0).all()) and float(maps.max()) == pytest.approx(1)
    painted = explanation.overlay(torch.zeros(2, 3, 24, 32), alpha=1.0)
    assert torch.equal(painted, (apply_colormap(maps, "turbo") * 255).round().to(torch.uint8))


def labels(figure: Any) -> list[str]:
    return [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]


def test_rows_of_figures_are_named() -> None:
    pytest.importorskip("matplotlib")
    explanation = replace(full(1, 3), targets=torch.tensor([[0, 2, 5]]))
    picture = Image.new("RGB", (32, 24))
    assert labels(explanation.plot(picture)) == ["cat", "a photo of an owl on a …", "hen"]
    # What the caller says wins, where they say something.
    assert labels(explanation.plot(picture, class_names={0: "tom"})) == ["tom", "a photo of an owl on a …", "hen"]
    assert labels(explanation.plot(picture, class_names=["tom"])) == ["tom", "a photo of an owl on a …", "hen"]
    assert labels(replace(explanation, names=None).plot(picture)) == ["class 0", "class 2", "class 5"]
    computed = replace(explanation, targets=torch.full((1, 3), -1))
    assert labels(computed.plot(picture)) == ["function"] * 3


def test_signed_figures_have_zero_in_the_middle() -> None:
    pytest.importorskip("matplotlib")
    explanation = full(2, 2, signed=True)
    assert explanation.ungated is not None
    explanation.relevance[0, 0] = torch.tensor([-3.0, 1.0] * 6)
    explanation.relevance[0, 1] = 0.0
    figure = explanation.plot(torch.zeros(2, 3, 24, 32), colormap="gray")
    ticks = [[tick.get_text() for tick in axes.get_xticklabels()] for axes in figure.axes]
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["image", "ungated", "gate, block 2", "gate, block 5", "relevance"]
    assert ["against", "0", "for"] in ticks and ["low", "high relevance"] not in ticks
    panels = [axes for axes in figure.axes if axes.images and axes.images[0].get_array().ndim == 3]
    results = [axes.images[0].get_array() for axes in panels if axes.get_ylabel() == ""]
    # The map of zeros: the middle grey at the 55 % that the colours weigh over a black picture.
    assert any(int(shown.min()) == int(shown.max()) == round(0.5 * 0.55 * 255) for shown in results)
    assert any((int(shown.min()), int(shown.max())) == (0, round((0.5 + 1 / 6) * 0.55 * 255)) for shown in results)
    unsigned = full(2, 2).plot(torch.zeros(2, 3, 24, 32))
    assert ["low", "high relevance"] in [[t.get_text() for t in axes.get_xticklabels()] for axes in unsigned.axes]
