"""ModelLayout for a model of one's own: defaults, what is refused, and corrections of a layout that was found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fga_fast import ModelLayout
from fga_fast.models.find import find_layout

Build = Callable[..., nn.Module]
BLOCKS = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])


def layout(**settings: Any) -> ModelLayout:
    return ModelLayout(**{"blocks": BLOCKS, "prefix_tokens": 1, "grid": (2, 3), **settings})


def test_defaults() -> None:
    found = layout()
    assert found.blocks == tuple(BLOCKS)
    assert (found.pooling, found.pooled, found.patches, found.tokens) == ("token", (0, 1), 6, 7)
    assert (found.image_size, found.in_chans, found.d_model, found.tower) == (None, 3, None, None)
    assert found.tokens_first is False


@pytest.mark.parametrize("pooling", ["average", "attention"])
def test_averages_and_attention_read_the_patches(pooling: str) -> None:
    assert layout(pooling=pooling).pooled == (1, 7)
    assert layout(pooling=pooling, pooled=(0, 7)).pooled == (0, 7)
    assert layout(pooling=pooling, prefix_tokens=0).pooled == (0, 6)


def test_lists_and_numpy_numbers_become_tuples_of_ints() -> None:
    numpy = pytest.importorskip("numpy")
    found = layout(blocks=list(BLOCKS), grid=[numpy.int64(2), 3], image_size=torch.Size((32, 48)), pooled=[2, 3])
    assert found == layout(image_size=(32, 48), pooled=(2, 3))
    assert type(found.grid[0]) is int


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"blocks": None}, TypeError, "blocks: expected a sequence of modules such as model.layers, got NoneType"),
        ({"blocks": []}, ValueError, "blocks: expected at least one block, got none"),
        ({"blocks": [BLOCKS[0], 3]}, TypeError, r"blocks\[1\]: expected a torch.nn.Module, got int"),
        ({"blocks": [BLOCKS[0]] * 2}, ValueError, "blocks: one module is there twice"),
        ({"prefix_tokens": -1}, ValueError, "prefix_tokens: expected 0 or more, got -1"),
        ({"prefix_tokens": True}, TypeError, "prefix_tokens: expected an int, got True"),
        ({"grid": (2, 0)}, ValueError, r"grid\[1\]: expected 1 or more, got 0"),
        ({"grid": 6}, TypeError, "grid: expected a pair of ints, got 6"),
        ({"grid": (2, 1.5)}, TypeError, r"grid\[1\]: expected an int, got 1.5"),
        ({"pooling": "max"}, ValueError, "pooling: expected one of 'token', 'average', 'attention', got 'max'"),
        ({"prefix_tokens": 0}, ValueError, r"no class token; give pooling='average' or .* pooled=\(i, i \+ 1\)"),
        ({"pooled": (0, 2)}, ValueError, r"pooled: pooling='token' reads one token, got the range \(0, 2\)"),
        ({"pooled": (3, 3), "pooling": "average"}, ValueError, r"pooled: expected a range .* the 7 tokens .*\(3, 3\)"),
        ({"pooled": (1, 8), "pooling": "average"}, ValueError, r"prefix_tokens=1 and a 2 x 3 grid\), got \(1, 8\)"),
        ({"image_size": (0, 4)}, ValueError, r"image_size\[0\]: expected 1 or more, got 0"),
        ({"in_chans": 0}, ValueError, "in_chans: expected 1 or more, got 0"),
        ({"d_model": "wide"}, TypeError, "d_model: expected an int, got 'wide'"),
        ({"tokens_first": 1}, TypeError, "tokens_first: expected True or False, got 1"),
        ({"tower": "model"}, TypeError, "tower: expected a torch.nn.Module or None, got str"),
        ({"tower": nn.Linear(2, 2)}, ValueError, r"tower: Linear does not hold blocks\[0\]; give its tower"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        layout(**settings)


def test_it_cannot_be_changed_but_replaced(tiny_vit: Build) -> None:
    found = find_layout(tiny_vit())
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.grid = (3, 2)  # type: ignore[misc]
    averaged = dataclasses.replace(found, pooling="average", pooled=None)
    assert averaged.pooled == (1, 7)
