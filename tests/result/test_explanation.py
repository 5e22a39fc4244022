"""Explanation: what its fields hold, its batches, its features, and what it refuses."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from explanations import NAMES, assert_same, example, full, tensors

from fga_fast.sae.features import TopFeatures

# features


def test_top_features_are_sorted_by_magnitude() -> None:
    explanation = example(1)
    index = torch.tensor([[5, 6, 7, 8]])
    patch_index = index.expand(1, 12, 4)
    contribution = torch.tensor([[0.5, -2.0, 1.0, 0.1]])
    patch_contribution = torch.arange(48.0).view(1, 12, 4)
    explanation.features[2] = TopFeatures(patch_index, patch_contribution, index, contribution)
    assert explanation.top_features(2, 3) == [[(6, -2.0), (7, 1.0), (5, 0.5)]]
    assert len(explanation.top_features(2)[0]) == 4
    assert explanation.top_features(2, 1, patch=(1, 2)) == [[(8, 27.0)]]
    assert explanation.top_features(2, 1)[0][0].feature == 6


def test_top_features_with_several_targets() -> None:
    found = example(2, targets=3).top_features(5, 2)
    assert (len(found), len(found[0]), len(found[0][0])) == (2, 3, 2)
    assert example(0).top_features(5, 2) == []


def test_top_features_refuses() -> None:
    with pytest.raises(ValueError, match=r"only for blocks \[2, 5\], got 3; construct Explainer\(.*top_features=k"):
        example().top_features(3, 1)
    with pytest.raises(ValueError, match="for no block"):
        example(layers=()).top_features(3, 1)
    with pytest.raises(ValueError, match="k: expected 1 to 4, got 5"):
        example().top_features(2, 5)
    with pytest.raises(ValueError, match="inside the 3x4 grid"):
        example().top_features(2, 1, patch=(3, 0))


# batches


def test_indexing_iteration_and_moving_take_everything_along() -> None:
    explanation = full(3, 2)
    assert len(explanation) == 3
    assert_same(explanation[-1], explanation[2:])
    for number, one in enumerate(explanation):
        assert (one.names, one.start_block, one.backend_reason) == (NAMES, 2, "compiled")
        found = tensors(one)
        assert found.keys() == tensors(explanation).keys()
        assert all(torch.equal(found[name], value[number : number + 1]) for name, value in tensors(explanation).items())
    moved = tensors(explanation.to("meta"))
    assert moved.keys() == tensors(explanation).keys() and {value.device.type for value in moved.values()} == {"meta"}
    with pytest.raises(IndexError, match=r"image 3 of an explanation of 3"):
        explanation[3]


def test_single_takes_away_an_axis_of_one_target() -> None:
    plain, one = full(2, None), full(2, 1)
    assert plain.single() is plain
    one = replace(one, logits=one.logits[:, :1], values=one.logits[:, :1], names=None)  # one tensor in two fields
    found = tensors(one.single())
    for name, value in tensors(one).items():
        assert torch.equal(found[name], value if name == ".logits" else value[:, 0])
    assert full(0, 1).single().relevance.shape == (0, 12)
    with pytest.raises(ValueError, match=r"targets: expected one an image here, got \[2, 3\]; explain one"):
        full(2, 3).single()


def test_an_explanation_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        example().ungated = None  # type: ignore[misc]


def test_empty_batch() -> None:
    empty = example(0)
    assert empty.heatmap().shape == (0, 24, 32)
    assert example(0, targets=2).heatmap(5).shape == (0, 2, 5, 5)
    assert empty.overlay(torch.zeros(0, 3, 24, 32)).shape == (0, 24, 32, 3)
    assert example(0, targets=2).overlay(torch.zeros(0, 3, 24, 32)).shape == (0, 2, 24, 32, 3)
    assert list(empty) == []


def test_repr_says_what_it_is() -> None:
    text = repr(example(2))
    targets = ", ".join(map(str, example(2).targets.tolist()))
    for part in ("2 images of 24x32 px", "3x4 patches", f"targets [{targets}]", "gated blocks [2, 5]", "'native', "):
        assert part in text
    assert "0 images" in repr(example(0)) and "ungated" in repr(example(1, layers=()))
    assert len(repr(example(500))) < 300 and len(repr(full(400, 5))) < 350
    named = replace(full(2, None), targets=torch.tensor([1, 2]))
    for part in ("targets [dog, a photo of an owl on a …], gated", "from block 2", "'native' (compiled), "):
        assert part in repr(named)
    assert "targets [1, 2]" in repr(replace(named, names=None))
    assert "targets [function, function]" in repr(replace(named, targets=torch.tensor([-1, -1]), names=None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (3, 5)}, r"relevance: expected .*P = 3 \* 5, got \(2, 3, 12\)"),
        ({"targets": torch.zeros(2).long()}, r"targets: expected shape \(2, 3\) beside .*, got \(2,\)"),
        ({"logits": torch.zeros(3, 7)}, r"logits: expected \[2, classes\]"),
        ({"gates": {1: torch.ones(2, 3, 11)}}, r"gates\[1\]: expected shape \(2, 3, 12\)"),
        ({"scores": {1: torch.ones(2, 12)}}, r"scores\[1\]: expected shape \(2, 3, 12\)"),
        ({"ungated": torch.ones(1, 3, 12)}, r"ungated: expected shape \(2, 3, 12\)"),
        ({"features": {4: TopFeatures(*(torch.zeros(2, 3).long(),) * 4)}}, r"features\[4\]\.patch_index: expected"),
        ({"values": torch.zeros(2)}, r"values: expected shape \(2, 3\)"),
        ({"blocks": torch.zeros(2, 3, 12)}, r"blocks: expected shape .*, got \(2, 3, 12\)"),
        ({"blocks": torch.zeros(2, 3, 4, 11)}, r"blocks: expected shape \(2, 3, 4, 12\)"),
        ({"blocks": torch.zeros(2, 3, 0, 12)}, "blocks: expected shape"),
        ({"names": ("cat",)}, "names: expected 7 str, one a column of logits, got"),
        ({"names": (1,) * 7}, "names: expected 7 str"),
        ({"start_block": -1}, "start_block: expected a block number from 0, got -1"),
        ({"start_block": 1.0}, "start_block: expected a block number"),
    ],
)
def test_shapes_must_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(full(), **change)
