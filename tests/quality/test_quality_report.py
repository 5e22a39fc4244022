"""Reports of SAE quality: complete, true to the numbers, and a page that asks for nothing from anywhere."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from html_page import Page
from own_vit import own_vit
from quality_case import exact_sae, items, random_sae

from fga_fast.quality import plots, words
from fga_fast.quality.behaviour import Effect
from fga_fast.quality.histogram import Histogram
from fga_fast.quality.plots import Axis
from fga_fast.quality.report import Written, write
from fga_fast.quality.run import Quality, compare
from fga_fast.quality.words import number, share, warnings, warnings_of_images

HOSTILE = "<b>\"odd' | name</b>&\n# \udce9 `x` [a](b)"


@pytest.fixture(scope="module")
def found() -> dict[str, Quality]:
    model = own_vit()
    saes = {HOSTILE: (1, random_sae()), "block 1: exact": (1, exact_sae()), "block 0": (0, random_sae(seed=3))}
    images = items(4, classes=(1, None))
    measured = compare(
        model, saes, images, second={1: random_sae()}, layout=model.layout(), output="sigmoid", progress=False
    )
    errors = (("<i>bad.png", "ImageFileError: <script>alert(1)</script>"), ("caf\udce9.png", "OSError: gone"))
    return {name: replace(one, errors=errors) for name, one in measured.items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, found: dict[str, Quality]) -> Written:
    return write(tmp_path_factory.mktemp("out") / "new", found, {"Command": "fga-fast sae-report 'a <b>'"})


def test_the_page_asks_for_nothing_and_can_be_heard(written: Written) -> None:
    text = written.html.read_text(encoding="utf-8")
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "img", "use", "b", "i"}
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len({*ids}) >= 3
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on") and "://" not in value and name not in ("src", "srcset", "action")
            assert name != "href" or (tag == "a" and value.removeprefix("#") in ids)
        assert "aria-labelledby" not in attributes or attributes["aria-labelledby"] in ids
    assert not re.search(r"url\(|@import|https?:", text)
    assert "prefers-color-scheme: dark" in text
    # Each plot says in words what it shows, and its numbers are in a table that keys can open.
    assert text.count('<svg role="img"') == len(re.findall(r'<svg role="img"[^>]*><title>[^<]{20,}</title>', text)) > 8
    assert text.count("<details><summary>") == text.count("</details>") >= 8
    assert len(re.findall(r'<th scope="(?:row|col)"', text)) == text.count("<th ") and "<th>" not in text
    assert page.headings[0] == 1 and all(b - a <= 1 for a, b in pairwise(page.headings))
    labels = [attributes["aria-label"] for _, attributes in page.tags if attributes.get("role") == "region"]
    assert "Table" not in labels and {"All autoencoders", "What a second SAE shares", "Error by position"} < {*labels}


def test_all_three_say_the_same(written: Written, found: dict[str, Quality]) -> None:
    page = Page(written.html.read_text(encoding="utf-8")).text
    markdown = written.markdown.read_text(encoding="utf-8")
    stored = json.loads(written.json.read_text(encoding="utf-8"))
    assert list(stored["saes"]) == list(found) and stored["facts"] == {"Command": "fga-fast sae-report 'a <b>'"}
    for name, one in found.items():
        kept = stored["saes"][name]
        assert kept["explained_variance"] == one.explained_variance and kept["recovered"] == one.behaviour.recovered
        assert kept["l0_histogram"]["counts"] == list(one.l0_histogram.counts)
        assert kept["behaviour"]["loss"]["mean"] == one.behaviour.loss.mean  # type: ignore[union-attr]
        assert kept["warnings"] == warnings(one)
        for value in (*words.summary(one).values(), *warnings(one), number(one.l0), share(one.dead)):
            assert value in page and value in markdown
    assert stored["warnings"] == warnings_of_images(one)
    assert all(text in page and text in markdown for text in stored["warnings"])
    assert "4 images" in page and "Shared" in page and "Several classes" in page and "ImageFileError" in page
    assert "Explained variance against L0, block 1" in page and "block 0" in page
    rows = re.findall(r"^\| .*%.*\|$", markdown, re.MULTILINE)[:3]
    assert [len(row.replace("\\|", "").split("|")) for row in rows] == [12] * 3  # names cannot add columns
    assert "<script>" not in markdown and "\\<script\\>" in markdown


def test_nothing_half_written(tmp_path: Path, found: dict[str, Quality]) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="cannot write into the folder"):
        write(tmp_path / "file", found)
    with pytest.raises(ValueError, match="saes: expected at least one, got none"):
        write(tmp_path / "empty", {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def good(found: dict[str, Quality]) -> Quality:
    """A measurement without anything suspicious."""
    behaviour = replace(found["block 1: exact"].behaviour, loss_recovered=0.9, known=1000)
    return replace(
        found["block 1: exact"], images=1000, tokens=100_000, features=1000, explained_variance=0.9, l0=20.0,
        expected_l0=20, dead=0.02, copies=0.0, errors=(), behaviour=behaviour, stability=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"explained_variance": -0.3}, "Explained variance is -30.0 %: the mean of all patches"),
        ({"explained_variance": 0.05}, "Explained variance is 5.0 %"),
        ({"explained_variance": 0.5}, "Explained variance is only 50.0 %"),
        ({"l0": 41.0}, "L0 is 41, and 20 was expected"),
        ({"l0": 9.0}, "L0 is 9, and 20 was expected"),
        ({"l0": 0.5, "expected_l0": None}, "most patches activate nothing"),
        ({"l0": 300.0, "expected_l0": None}, "L0 is 300 of 1,000 features: these codes are not sparse"),
        ({"dead": 0.2}, "20.0 % of the features are dead"),
        ({"copies": 0.2}, "20.0 % of the features are near-copies"),
    ],
)
def test_what_is_suspicious_is_said(found: dict[str, Quality], changes: dict[str, Any], words: str) -> None:
    assert warnings(good(found)) == warnings_of_images(good(found)) == []
    (said,) = warnings(replace(good(found), **changes))
    assert words in said
    assert warnings(replace(good(found), dead=0.2, tokens=9_000)) == []


def test_what_is_suspicious_of_the_model_and_the_images(found: dict[str, Quality]) -> None:
    one = good(found)
    (said,) = warnings(replace(one, behaviour=replace(one.behaviour, loss_recovered=0.4)))
    assert "Only 40.0 % of what the patches are worth to the model is recovered" in said
    (said,) = warnings(replace(one, behaviour=replace(one.behaviour, loss_recovered=None)))
    assert "What is recovered cannot be said" in said
    no_classes = replace(one.behaviour, loss=None, loss_recovered=None, divergence_recovered=0.3)
    (said,) = warnings(replace(one, behaviour=no_classes))
    assert "Only 30.0 %" in said
    beside = found[HOSTILE].stability
    assert beside is not None
    few = replace(beside, forth=replace(beside.forth, matched=0.1))
    assert "10.0 % of the features have a partner" in warnings(replace(one, stability=few))[0]
    assert warnings(replace(one, stability=beside)) == []
    said = " ".join(warnings_of_images(replace(one, images=1, tokens=6, errors=(("a", "b"),))))
    assert "1 image could not be measured" in said and "Only 6 patches were seen" in said


def test_few_images_with_a_known_class_are_said(found: dict[str, Quality]) -> None:
    """What is recovered is theirs, however many images there are without."""
    one = good(found)
    (said,) = warnings_of_images(replace(one, behaviour=replace(one.behaviour, known=1)))
    assert "Loss, accuracy and what is recovered are rough, as means over 1 image with a known class; give 100" in said
    assert not warnings_of_images(replace(one, behaviour=replace(one.behaviour, known=100)))
    none = replace(one.behaviour, known=0, loss=None, loss_recovered=None)
    assert not warnings_of_images(replace(one, behaviour=none))
    (said,) = warnings_of_images(replace(one, images=99, behaviour=none))
    assert said == "What is recovered is rough, as a mean over 99 images; give 100 or more."


def test_histograms_of_different_totals_are_compared_by_shares() -> None:
    edges = (0.0, 1.0, 2.0)
    page = Page(plots.bars(Histogram(edges, (3000, 1000)), Axis("cosine", "features"), Histogram(edges, (10, 30))))
    assert "3,000 (75.0 %)25.0 %" in page.text and "1,000 (25.0 %)75.0 %" in page.text


def test_plots_of_odd_numbers() -> None:
    axis = Axis("<label>", "things")
    assert plots.bars(Histogram((0, 1, 2), (0, 0)), axis) == "<p>&lt;label&gt;: none.</p>"
    for edges, counts, other in (
        ((0, 1), (5,), None), ((0, 1, 2), (0, 10**9), (1, 0)), ((-1, 0, 1), (1, 0), (0, 0)),
    ):  # fmt: skip
        chance = None if other is None else Histogram(edges, other)
        for whole in (False, True):
            drawn = plots.bars(Histogram(edges, counts), axis._replace(whole=whole), chance)
            Page(drawn)
            assert "nan" not in drawn and "<label>" not in drawn and "&lt;label&gt;" in drawn
    assert plots.positions([[None, None]]) == "<p>No position varies.</p>"
    drawn = plots.positions([[0.5, None], [0.5, 0.5]])
    Page(drawn)
    assert drawn.count('class="cell"') == 3 and "nan" not in drawn
    for points in ([("1", 16.0, 0.9), ("2", 16.0, 0.9)], [("<1>", 0.0, -3.0), ("2", 900.0, 0.99)]):
        drawn = plots.scatter(points, "title")
        Page(drawn)
        assert drawn.count("<circle") == 2 and "nan" not in drawn and "<1>" not in drawn


def test_numbers_to_read() -> None:
    assert [number(value) for value in (0.0, -0.0, 16.0, 0.12345, 123456.0)] == ["0", "0", "16", "0.123", "123456"]
    assert [share(value) for value in (0.5, 1.0, -0.02, None, float("nan"))] == [
        "50.0 %",
        "100.0 %",
        "-2.0 %",
        "–",
        "–",
    ]
    assert [words.count(n, what) for n, what in ((1, "patch"), (0, "patch"), (1000, "image"))] == [
        "1 patch", "0 patches", "1,000 images",
    ]  # fmt: skip
    assert Effect(0.1, 0.2, 0.3).recovered == pytest.approx(0.5)
