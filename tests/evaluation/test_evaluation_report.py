"""Reports: complete, true to the values, and one file that asks for nothing from anywhere."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluated import LARGEST, exact, items, seeded, subject
from html_page import Page
from PIL import Image

from fga_fast.dataset.items import Item
from fga_fast.evaluation import report, store, wording
from fga_fast.evaluation.examples import examples
from fga_fast.evaluation.measures import MEASURES
from fga_fast.evaluation.plots import Dot, dots
from fga_fast.evaluation.report import Written
from fga_fast.evaluation.run import evaluate
from fga_fast.evaluation.wording import best_of, number, probability

pytest.importorskip("pyarrow")
pytest.importorskip("scipy")
HIGHER = {"largest": True, "smallest": False}
COMMAND = "fga-fast evaluate 'my <images>' --out here"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    out = tmp_path_factory.mktemp("report")
    given, methods = items(30), {"exact": exact, "seeded": seeded}
    path = evaluate(subject(), given, {**methods, "<b>odd": exact}, LARGEST, out=out, split="report", progress=False)
    shown = examples(store.read(path), HIGHER, methods, subject(), given)
    return report.write(
        out, baselines=("seeded",), controls={"seeded": "drawn by chance", "gone": "not run"}, command=COMMAND,
        examples=shown,
    )  # fmt: skip


def test_the_page_asks_for_nothing(written: Written) -> None:
    text = written.html.read_text(encoding="utf-8")
    page = Page(text)
    assert not {*page.found} & {"script", "link", "iframe", "object", "embed", "base", "form", "audio", "video", "use"}
    for tag, name, value in ((tag, *pair) for tag, attributes in page.tags for pair in attributes.items()):
        if name in ("src", "href", "srcset", "xlink:href", "action", "data", "poster"):
            assert (tag, name) == ("img", "src") and value.startswith("data:image/png;base64,")
        assert not name.startswith("on") and "://" not in value
    assert not re.search(r"url\(|@import|https?:|//[a-z]", re.sub(r"base64,[^\"]*", "", text))
    wide = [one for one in page.found["div"] if one.get("class") == "wide"]
    assert [(one["aria-label"], one["role"], one["tabindex"]) for one in wide] == [
        ("Means", "region", "0"), ("Comparisons", "region", "0")
    ]  # fmt: skip
    assert "prefers-color-scheme: dark" in text and "color-scheme: light dark" in text


def test_the_page_says_what_must_be_known(written: Written) -> None:
    text = Page(written.html.read_text(encoding="utf-8")).text
    images = written.facts.settings["images"]
    for part in (
        "the half 'report'", "corrected by Holm over all 4 comparisons", "seeded: drawn by chance",
        f"n = {images} images", "seed 0", "batch_size", COMMAND, "<b>odd", "largest ↑", "smallest ↓",
        "none: every image", "★",
    ):  # fmt: skip
        assert part in text, part
    assert "gone" not in text


def test_both_reports_say_the_same_numbers(written: Written) -> None:
    page, markdown = Page(written.html.read_text(encoding="utf-8")).text, written.markdown.read_text(encoding="utf-8")
    for one in written.facts.analysis.comparisons:
        for value in (number(one.gain), probability(one.wilcoxon_holm), number(one.rank_biserial), number(one.dz)):
            assert value in page and value in markdown
    means = {(one.method, one.metric): one.mean for one in written.facts.analysis.summaries}
    best = best_of(written.facts.analysis.summaries)
    assert best["smallest"] == {"exact", "<b>odd"} and best["largest"] == {"seeded"}
    assert means["exact", "smallest"] < means["seeded", "smallest"]
    for metric, methods in best.items():
        assert all(f"**{number(means[method, metric])}**" in markdown for method in methods)
    assert "(control)" in markdown and COMMAND in markdown and "Holm" in markdown and "**Split**" in markdown


def test_the_examples_are_the_extremes(written: Written) -> None:
    table = store.read(written.html.parent)
    shown = examples(table, HIGHER, {"exact": exact, "seeded": seeded}, subject(), items(30), count=2)
    assert [one.best for one in shown] == [True, True, False, False]
    values = {(row["key"], row["method"]): row["value"] for row in table.to_pylist() if row["metric"] == "largest"}
    gain = {key: values[key, "exact"] - values[key, "seeded"] for key, method in values if method == "exact"}
    order = sorted(gain, key=gain.__getitem__)
    assert [one.name for one in shown] == [order[-1], order[-2], order[0], order[1]]
    assert shown[0].gain == pytest.approx(gain[order[-1]])
    for picture in shown[0].pictures:
        assert Image.open(io.BytesIO(picture)).size == (224, 224)
    assert base64.b64encode(shown[0].pictures[1]).decode() in written.html.read_text(encoding="utf-8")
    assert examples(table, HIGHER, {"exact": exact, "none": seeded}, subject(), items(30)) == []

    def broken(*_: object) -> Any:
        raise OSError("gone")

    assert examples(table, HIGHER, {"exact": broken, "seeded": seeded}, subject(), items(30), count=1) == []
    with pytest.raises(ValueError, match="methods: expected two to compare, got 1"):
        examples(table, HIGHER, {"exact": exact}, subject(), items(30))


@pytest.mark.parametrize(
    ("split", "part"), [("tune", "publish those of 'report'"), ("both", "only if nothing was chosen")]
)
def test_splits_errors_and_missing_controls_are_said(tmp_path: Path, split: Any, part: str) -> None:
    def broken(*_: object) -> Any:
        raise OSError("<none>")

    evaluate(
        subject(), items(12), {"exact": exact, "broken": broken}, LARGEST, out=tmp_path, split=split, progress=False
    )
    found = report.write(tmp_path, baselines=("transmm",))
    for text in (Page(found.html.read_text(encoding="utf-8")).text, found.markdown.read_text(encoding="utf-8")):
        assert part in text and "none was run, so nothing here says" in text
        assert f"{found.facts.errors.total()} row(s) are errors: OSError: <none>" in text
    assert found.facts.errors == {"OSError: <none>": json.loads((tmp_path / "settings.json").read_text())["items"]}


def test_means_say_how_many_images_they_are_over(written: Written, tmp_path: Path) -> None:
    count = written.facts.settings["images"]
    page, markdown = Page(written.html.read_text(encoding="utf-8")).text, written.markdown.read_text(encoding="utf-8")
    for text in (page, markdown):
        assert f"Every mean is over n = {count} images." in text and "go by the comparisons" not in text

    def picky(subject: Any, images: Any, targets: Any) -> Any:
        if bool((images[:, 0, 0, 0] == 0).any()):
            raise KeyError("zero")
        return exact(subject, images, targets)

    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:5, 2:5] = True
    given = [replace(one, mask=mask) if n < 2 else one for n, one in enumerate(items(5))]
    given += [Item("zero", torch.zeros(3, 8, 8), 0)]
    metrics = {**LARGEST, "localisation": MEASURES["localisation"]}
    evaluate(subject(), given, {"exact": exact, "picky": picky}, metrics, out=tmp_path, split="both", progress=False)
    found = report.write(tmp_path, baselines=("exact",))
    cells = wording.cells(found.facts)
    assert {(*key, cell.images) for key, cell in cells.items()} == {
        ("exact", "largest", "n = 6"), ("exact", "smallest", "n = 6"), ("picky", "largest", "n = 5"),
        ("picky", "smallest", "n = 5"), *((name, metric, "n = 2") for name in ("exact", "picky")
                                          for metric in ("inside", "pointing")),
    }  # fmt: skip
    page, markdown = Page(found.html.read_text(encoding="utf-8")).text, found.markdown.read_text(encoding="utf-8")
    for text in (page, markdown):
        assert text.count("n = 2") >= 4 and "n is the number of images with a value." in text
        assert "comparisons take only images with both values" in text
    assert "largest ↑, mean and 95 % interval, n = 5 to 6" in page and "smallest, gain over exact" in page


def test_too_few_images_are_said(tmp_path: Path) -> None:
    evaluate(
        subject(), items(4), {"exact": exact, "seeded": seeded}, LARGEST, out=tmp_path, split="both", progress=False
    )
    text = report.write(tmp_path, baselines=("seeded",)).markdown.read_text(encoding="utf-8")
    assert "2 comparisons need at least 7 images" in text


def test_an_unfinished_run_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"values: no file .*; run the evaluation to its end first"):
        report.write(tmp_path)


def test_plots_of_odd_numbers() -> None:
    nan = float("nan")
    for rows in ([Dot("a & b", 1.0, 1.0, 1.0, True)], [Dot("a", nan, nan, nan, False), Dot("b", 0, -1e-9, 1e9, False)]):
        drawn = dots(rows, "<title>", zero=True)
        Page(drawn)
        assert "nan" not in drawn and "&lt;title&gt;" in drawn
    assert dots([Dot("a", nan, nan, nan, False)], "t") == "<p>t: no values.</p>"
    assert (number(123456.0), number(-0.0), number(nan), number(1e-9)) == ("123456", "0", "–", "1e-09")
    assert (probability(1e-5), probability(0.0312), probability(nan)) == ("p < 0.0001", "p = 0.031", "–")
