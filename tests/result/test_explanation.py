"""Explanation: its numbers by their definition, its pictures, and what it refuses."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from explanations import assert_same, example, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fga_fast.result.colours import NAMES, apply_colormap
from fga_fast.result.explanation import Explanation
from fga_fast.sae.features import TopFeatures

# heat maps


def bilinear_by_hand(values: list[list[float]], height: int, width: int) -> list[list[float]]:
    """Pixel centres mapped by `(i + 0.5) * rows / height - 0.5`, clamped to the grid."""
    rows, columns = len(values), len(values[0])

    def place(i: int, size: int, count: int) -> tuple[int, int, float]:
        at = min(max((i + 0.5) * count / size - 0.5, 0.0), count - 1.0)
        return math.floor(at), min(math.floor(at) + 1, count - 1), at - math.floor(at)

    picture = []
    for y in range(height):
        top, bottom, v = place(y, height, rows)
        line = []
        for x in range(width):
            left, right, h = place(x, width, columns)
            upper = values[top][left] * (1 - h) + values[top][right] * h
            lower = values[bottom][left] * (1 - h) + values[bottom][right] * h
            line.append(upper * (1 - v) + lower * v)
        picture.append(line)
    return picture


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**16))
def test_heatmap_is_bilinear_then_min_max(rows: int, columns: int, height: int, width: int, seed: int) -> None:
    relevance = torch.randn(1, rows * columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = Explanation(relevance, torch.zeros(1, 2), torch.zeros(1).long(), (rows, columns), (height, width)).heatmap()
    expected = torch.tensor(
        bilinear_by_hand(relevance.view(rows, columns).tolist(), height, width), dtype=torch.float64
    )
    span = float(expected.max() - expected.min()) + 1e-8
    expected = (expected - expected.min()) / span
    # Rounding of the interpolated values, enlarged as the division enlarges it: all there is where a map is constant.
    rounding = 8 * torch.finfo(torch.float64).eps * float(relevance.abs().max()) / span
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=1e-12 + rounding)


def test_heatmap_is_scaled_per_image_and_target() -> None:
    explanation = example(2, targets=3)
    explanation.relevance[1, 2] *= 1000
    maps = explanation.heatmap()
    assert maps.shape == (2, 3, 24, 32)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.amax((-2, -1)), torch.ones(2, 3), rtol=0, atol=1e-6)
    assert bool((maps.amin((-2, -1)) == 0).all())
    torch.testing.assert_close(explanation[1].heatmap()[0], maps[1])


def test_heatmap_sizes_and_dtypes() -> None:
    explanation = example()
    assert explanation.heatmap(7).shape == (2, 7, 7)
    assert explanation.heatmap((5, 9)).shape == (2, 5, 9)
    assert example(dtype=torch.float64).heatmap().dtype == torch.float64
    with pytest.raises(ValueError, match="size: expected at least 1 pixel"):
        explanation.heatmap(0)


def test_constant_relevance_gives_zeros() -> None:
    explanation = example()
    explanation.relevance = torch.full((2, 12), 0.3)
    assert explanation.heatmap().abs().max() == 0


# overlays and colours


def test_overlay_between_image_and_colours() -> None:
    explanation = example(1)
    image = torch.rand(1, 3, 24, 32)
    plain = (image.permute(0, 2, 3, 1) * 255).round().to(torch.uint8)
    assert torch.equal(explanation.overlay(image, alpha=0.0), plain)
    colours = (apply_colormap(explanation.heatmap(), "magma") * 255).round().to(torch.uint8)
    assert torch.equal(explanation.overlay(image, "magma", alpha=1.0), colours)
    half = explanation.overlay(image, "magma", alpha=0.5)
    assert (half.float() - (plain.float() + colours.float()) / 2).abs().max() <= 1


def test_overlay_shapes_follow_the_picture() -> None:
    pictures = [Image.new("RGB", (64, 48)) for _ in range(2)]
    assert example(2).overlay(pictures).shape == (2, 48, 64, 3)
    assert example(2, targets=3).overlay(pictures).shape == (2, 3, 48, 64, 3)
    assert example(1).overlay(np.zeros((48, 64, 3), dtype=np.uint8)).dtype == torch.uint8


def test_overlay_shows_the_strongest_patch() -> None:
    explanation = example(1)
    explanation.relevance = torch.zeros(1, 12)
    explanation.relevance[0, 1 * 4 + 2] = 1.0
    painted = explanation.overlay(torch.zeros(3, 24, 32), "gray", alpha=1.0)[0, :, :, 0]
    row, column = divmod(int(painted.argmax()), 32)
    assert 8 <= row < 16
    assert 16 <= column < 24


def test_overlay_refuses() -> None:
    explanation, image = example(1), torch.zeros(3, 24, 32)
    with pytest.raises(ValueError, match="alpha: expected a number in"):
        explanation.overlay(image, alpha=1.5)
    with pytest.raises(ValueError, match=r"colormap: expected one of turbo.*'jet'"):
        explanation.overlay(image, "jet")
    with pytest.raises(ValueError, match=r"expected 1 picture\(s\)"):
        explanation.overlay(torch.zeros(2, 3, 24, 32))
    explanation.relevance[0, 3] = torch.nan
    with pytest.raises(ValueError, match="relevance: contains NaN or Inf"):
        explanation.overlay(image)


@pytest.mark.parametrize("name", NAMES)
def test_colormaps_are_the_published_ones(name: str) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    ours = apply_colormap(torch.linspace(0, 1, 256), name).numpy()
    theirs = matplotlib.colormaps[name](np.arange(256))[:, :3]
    assert np.abs(ours - theirs).max() < 6.5 / 255


def test_colormap_ends() -> None:
    values = torch.tensor([[-1.0, 0.0], [1.0, 7.0]], dtype=torch.float64)
    colours = apply_colormap(values, "gray")
    assert colours.dtype == torch.float64
    assert colours[..., 0].tolist() == [[0.0, 0.0], [1.0, 1.0]]


# figures


def test_plot_has_the_promised_panels() -> None:
    pytest.importorskip("matplotlib")
    figure = example(2).plot(torch.rand(2, 3, 24, 32), class_names=[f"name {i}" for i in range(7)])
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["image", "TransMM", "gate, block 2", "gate, block 5", "FGA"]
    labels = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
    assert labels == [f"name {target}" for target in example(2).targets.tolist()]
    gates = [axes.images[0] for axes in figure.axes if axes.get_title().startswith("gate")]
    limits = {gate.get_clim() for gate in gates}
    (low, high) = limits.pop()
    assert not limits  # one colour scale for all gates
    assert low == -high  # centred at a gate of 1
    largest = max(float(gate.log().abs().max()) for gate in example(2).gates.values())
    assert high == pytest.approx(largest, rel=1e-6)


def test_plot_without_gates_and_with_several_targets() -> None:
    pytest.importorskip("matplotlib")
    ungated = example(1, layers=()).plot(Image.new("RGB", (32, 24)))
    assert [axes.get_title() for axes in ungated.axes if axes.get_title()] == ["image", "TransMM"]
    several = example(2, targets=3).plot(torch.rand(2, 3, 24, 32))
    assert len([axes for axes in several.axes if axes.get_ylabel()]) == 6


def test_plot_leaves_the_explanation_and_pyplot_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    explanation = example(1)
    before = {name: value.clone() for name, value in tensors(explanation).items()}
    explanation.plot(Image.new("RGB", (32, 24))).savefig(tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").width > 400
    assert all(torch.equal(value, before[name]) for name, value in tensors(explanation).items())
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


def test_plot_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="1 to 64 image-target rows"):
        example(0).plot([])
    broken = example(1)
    broken.gates[2][0, 0] = 0.0
    with pytest.raises(ValueError, match="gates: contain"):
        broken.plot(torch.zeros(3, 24, 32))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'fga_fast\[plot\]'"):
        example(1).plot(torch.zeros(3, 24, 32))


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
    with pytest.raises(ValueError, match=r"only for layers \[2, 5\], got 3; construct Explainer\(.*top_features=k"):
        example().top_features(3, 1)
    with pytest.raises(ValueError, match="for no layer"):
        example(layers=()).top_features(3, 1)
    with pytest.raises(ValueError, match="k: expected 1 to 4, got 5"):
        example().top_features(2, 5)
    with pytest.raises(ValueError, match="inside the 3x4 grid"):
        example().top_features(2, 1, patch=(3, 0))


# batches


def test_indexing_and_iteration() -> None:
    explanation = example(3)
    assert len(explanation) == 3
    assert_same(explanation[-1], explanation[2:])
    assert [one.targets.tolist() for one in explanation] == [[target] for target in explanation.targets.tolist()]
    assert explanation[1].gates[5].tolist() == [explanation.gates[5][1].tolist()]
    with pytest.raises(IndexError, match=r"image 3 of an explanation of 3"):
        explanation[3]


def test_empty_batch(tmp_path: Path) -> None:
    empty = example(0)
    assert empty.heatmap().shape == (0, 24, 32)
    assert example(0, targets=2).heatmap(5).shape == (0, 2, 5, 5)
    assert empty.overlay(torch.zeros(0, 3, 24, 32)).shape == (0, 24, 32, 3)
    assert list(empty) == []
    assert "0 images" in repr(empty)
    assert_same(Explanation.load(empty.save(tmp_path / "empty.safetensors")), empty)


def test_to_moves_every_tensor() -> None:
    moved = example().to("meta")
    assert {value.device.type for value in tensors(moved).values()} == {"meta"}
    assert tensors(moved).keys() == tensors(example()).keys()


def test_repr_says_what_it_is() -> None:
    text = repr(example(2))
    targets = ", ".join(map(str, example(2).targets.tolist()))
    for part in ("2 images of 24x32 px", "3x4 patches", f"targets [{targets}]", "gated layers [2, 5]", "'native'"):
        assert part in text
    assert "ungated" in repr(example(1, layers=()))
    assert len(repr(example(500))) < 300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (3, 5)}, r"relevance: expected .*P = 3 \* 5, got \(2, 12\)"),
        ({"targets": torch.zeros(3).long()}, r"targets: expected shape \(2,\)"),
        ({"logits": torch.zeros(3, 7)}, r"logits: expected \[2, classes\]"),
        ({"gates": {1: torch.ones(2, 11)}}, r"gates\[1\]: expected shape \(2, 12\)"),
        ({"ungated": torch.ones(1, 12)}, r"ungated: expected shape \(2, 12\)"),
        ({"features": {4: TopFeatures(*(torch.zeros(2, 3).long(),) * 4)}}, r"features\[4\]\.patch_index: expected"),
    ],
)
def test_shapes_must_fit(change: dict[str, object], message: str) -> None:
    fields = {name: getattr(example(), name) for name in Explanation.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        Explanation(**(fields | change))
