"""Explanations as pictures: heat maps, overlays, colours and figures."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from explanations import example, full, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn import functional

from fga_fast.result.colours import NAMES, apply_colormap
from fga_fast.result.explanation import Explanation
from fga_fast.result.heatmap import to_picture
from fga_fast.sae.notes import Note

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
    speaking_for = [[max(value, 0.0) for value in row] for row in relevance.view(rows, columns).tolist()]
    expected = torch.tensor(bilinear_by_hand(speaking_for, height, width), dtype=torch.float64)
    span = float(expected.max() - expected.min())
    if span <= 8 * torch.finfo(torch.float64).eps * float(expected.abs().max()):
        assert not found.any()
        return
    expected = (expected - expected.min()) / span
    # Rounding of the interpolated values, enlarged as the division enlarges it: all there is where a map is constant.
    rounding = 8 * torch.finfo(torch.float64).eps * float(relevance.abs().max()) / span
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=1e-12 + rounding)


@pytest.mark.parametrize("scale", (1e-12, 1e-30))
def test_pictures_have_the_scale_of_their_own_values(scale: float) -> None:
    explanation = example(2)
    tiny = replace(explanation, relevance=scale * explanation.relevance)
    torch.testing.assert_close(tiny.heatmap(), explanation.heatmap(), rtol=1e-4, atol=1e-5)


def test_pictures_show_the_signal_where_there_is_one() -> None:
    explanation = example(2)
    beside = replace(explanation, relevance=0.25 + 1e-12 * explanation.relevance, signal=1e-12 * explanation.relevance)
    torch.testing.assert_close(beside.heatmap(), explanation.heatmap(), rtol=1e-4, atol=1e-5)
    picture = Image.new("RGB", (32, 24), "white")
    assert torch.equal(beside.overlay([picture] * 2), explanation.overlay([picture] * 2))
    assert torch.equal(beside[1].shown, beside.signal[1:])  # type: ignore[index]


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
    assert replace(example(), relevance=torch.full((2, 12), 0.3)).heatmap().abs().max() == 0


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
    pictures = [Image.new("RGB", (64, 48), colour) for colour in ("white", "black")]
    assert example(2).overlay(pictures).shape == (2, 48, 64, 3)
    several = example(2, targets=3).overlay(pictures, alpha=0.0)
    assert several.shape == (2, 3, 48, 64, 3)
    assert bool((several[0] == 255).all()) and bool((several[1] == 0).all())
    assert example(1).overlay(np.zeros((48, 64, 3), dtype=np.uint8)).dtype == torch.uint8


def test_overlay_shows_the_strongest_patch() -> None:
    relevance = torch.zeros(1, 12)
    relevance[0, 1 * 4 + 2] = 1.0
    painted = replace(example(1), relevance=relevance).overlay(torch.zeros(3, 24, 32), "gray", alpha=1.0)[0, :, :, 0]
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
    theirs = matplotlib.colormaps[{"diverging": "RdBu_r"}.get(name, name)](np.arange(256))[:, :3]
    assert np.abs(ours - theirs).max() < 6.5 / 255


def test_colormap_ends() -> None:
    values = torch.tensor([[-1.0, 0.0], [1.0, 7.0]], dtype=torch.float64)
    colours = apply_colormap(values, "gray")
    assert colours.dtype == torch.float64
    assert colours[..., 0].tolist() == [[0.0, 0.0], [1.0, 1.0]]


def test_signed_relevance_in_heat_maps_and_overlays() -> None:
    explanation = full(2, 3, signed=True)
    assert bool((explanation.relevance < 0).any())
    maps = explanation.heatmap()
    assert bool((maps.amin((-2, -1)) == 0).all()) and float(maps.max()) == pytest.approx(1)
    centred = to_picture(explanation.relevance, explanation.grid, (24, 32), centred=True)
    picture = torch.full((2, 3, 24, 32), 0.2)
    painted = explanation.overlay(picture, "turbo", alpha=1.0)
    assert torch.equal(painted, (apply_colormap(centred, "turbo") * 255).round().to(torch.uint8))
    # By default in diverging colours: the picture where relevance is 0, the colours from half of the largest on.
    painted = explanation.overlay(picture, alpha=1.0)
    nothing, much = (centred - 0.5).abs() < 1e-3, (centred - 0.5).abs() >= 0.25
    assert bool(nothing.any()) and bool(much.any())
    assert float((painted[nothing].float() - 51).abs().max()) <= 1
    assert torch.equal(painted[much], (apply_colormap(centred[much], "diverging") * 255).round().to(torch.uint8))


# figures


def titles(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.texts if text.get_va() == "baseline"]


def labels(figure: Any) -> list[str]:
    """Of the rows."""
    return [text.get_text() for text in figure.texts if text.get_rotation() == 90]


def scale(figure: Any) -> list[str]:
    """The words under the colour bars."""
    return [text.get_text() for text in figure.texts if text.get_va() == "top"]


def panel(figure: Any, title: str, row: int) -> Tensor:  # -> [200, 200, 3] uint8
    """The middle of a panel, as it is drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = torch.from_numpy(np.array(canvas.buffer_rgba()))
    (x,) = [text.get_position()[0] for text in figure.texts if text.get_text() == title]
    y = [text.get_position()[1] for text in figure.texts if text.get_rotation() == 90][row]
    left, above = round(x * pixels.shape[1]), round((1 - y) * pixels.shape[0])
    return pixels[above - 100 : above + 100, left - 100 : left + 100, :3]


def test_plot_has_the_promised_panels() -> None:
    pytest.importorskip("matplotlib")
    figure = example(2).plot(torch.rand(2, 3, 24, 32), class_names=[f"name {i}" for i in range(7)])
    assert titles(figure) == ["image", "TransMM", "gate, block 2", "gate, block 5", "FGA"]
    assert labels(figure) == [f"name {target}" for target in example(2).targets.tolist()]


def test_panels_show_their_values() -> None:
    """Pictures and heat maps as `overlay` paints them; gates in one colour scale for all, centred at 1."""
    matplotlib = pytest.importorskip("matplotlib")
    explanation = example(2)
    explanation.gates[2][:], explanation.gates[5][:] = 1.0, 4.0
    explanation.gates[5][1] = 0.5
    picture = torch.tensor([0.2, 0.4, 0.6]).view(3, 1, 1).expand(2, 3, 24, 32)
    figure = explanation.plot(picture, colormap="viridis")
    assert scale(figure) == ["low", "high relevance", "× 0.25", "× 1", "× 4"]
    for title, row, place in (("gate, block 2", 0, 0.5), ("gate, block 5", 0, 1.0), ("gate, block 5", 1, 0.25)):
        want = torch.tensor(matplotlib.colormaps["RdBu_r"](place)[:3]) * 255
        assert float((panel(figure, title, row) - want).abs().max()) <= 3  # of the table's 256 colours, the next
    assert panel(figure, "image", 1).unique(dim=0).squeeze().unique(dim=0).tolist() == [[51, 102, 153]]
    grey = (picture * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True).expand(-1, 3, -1, -1)
    large = functional.interpolate(grey, (236, 315))  # the size of a panel
    painted = explanation.overlay(large, colormap="viridis", alpha=0.55)
    for row in (0, 1):
        difference = panel(figure, "FGA", row).int() - painted[row, 18:218, 57:257].int()
        assert float(difference.abs().max()) <= 6  # a pixel further


def test_plot_without_gates_and_with_several_targets() -> None:
    pytest.importorskip("matplotlib")
    ungated = example(1, layers=()).plot(Image.new("RGB", (32, 24)))
    assert titles(ungated) == ["image", "TransMM"]
    assert scale(ungated) == ["low", "high relevance"]
    assert len(labels(example(2, targets=3).plot(torch.rand(2, 3, 24, 32)))) == 6


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


def test_rows_of_figures_are_named() -> None:
    pytest.importorskip("matplotlib")
    explanation = replace(full(1, 3), targets=torch.tensor([[0, 2, 5]]))
    picture = Image.new("RGB", (32, 24))
    assert labels(explanation.plot(picture)) == ["cat", "a photo of an owl on a …", "hen"]
    # What the caller says wins, where they say something.
    assert labels(explanation.plot(picture, class_names={0: "tom"})) == [
        "tom",
        "a photo of an owl on a …",
        "hen",
    ]
    assert labels(explanation.plot(picture, class_names=["tom"])) == ["tom", "a photo of an owl on a …", "hen"]
    assert labels(replace(explanation, names=None).plot(picture)) == ["class 0", "class 2", "class 5"]
    computed = replace(explanation, targets=torch.full((1, 3), -1))
    assert labels(computed.plot(picture)) == ["function"] * 3


def test_gates_name_their_strongest_feature() -> None:
    pytest.importorskip("matplotlib")
    explanation = example(2, targets=2)
    chosen = {}  # each row's strongest feature after block 5
    for row, pairs in enumerate(pair for image in explanation.top_features(5) for pair in image):
        chosen[row] = pairs[0].feature
    notes = {(5, chosen[0]): Note("sleeve"), (5, chosen[1]): Note("x" * 60), (2, 98): Note("not here")}
    explanation.features[5].image_index[1, 0] = -1  # none contributes
    figure = explanation.plot(torch.rand(2, 3, 24, 32), notes=notes)
    found = {text.get_text() for text in figure.texts if text.get_bbox_patch() is not None}
    of_block_2 = {f"feature {pairs[0].feature}" for image in explanation.top_features(2) for pairs in image}
    assert found == {"sleeve", "x" * 30 + " …", f"feature {chosen[3]}", *of_block_2}
    with pytest.raises(ValueError, match="1 to 64"):
        example(0).plot([], notes=notes)
    plain = explanation.plot(torch.rand(2, 3, 24, 32))
    assert all(text.get_bbox_patch() is None for text in plain.texts)


def test_signed_figures_have_zero_in_the_middle() -> None:
    pytest.importorskip("matplotlib")
    explanation = full(2, 2, signed=True)
    assert explanation.ungated is not None
    explanation.relevance[0, 0] = torch.tensor([-3.0, 1.0] * 6)
    explanation.relevance[0, 1] = 0.0
    figure = explanation.plot(torch.zeros(2, 3, 24, 32), colormap="gray")
    assert titles(figure) == ["image", "ungated", "gate, block 2", "gate, block 5", "relevance"]
    assert scale(figure)[:3] == ["against", "0", "for"]
    # At the 55 % that the colours weigh over a black picture; the map of zeros is the middle grey.
    drawn = panel(figure, "relevance", 0)
    assert int(drawn.min()) == 0 and abs(int(drawn.max()) - (0.5 + 1 / 6) * 0.55 * 255) <= 1
    assert panel(figure, "relevance", 1).unique().tolist() == [round(0.5 * 0.55 * 255)]
