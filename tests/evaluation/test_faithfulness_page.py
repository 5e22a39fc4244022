"""The numbers of docs/faithfulness.md are those of the rows beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fga_fast.evaluation import store
from fga_fast.evaluation.measures import flat
from fga_fast.evaluation.statistics import Analysis, analyse

pytest.importorskip("pyarrow")
pytest.importorskip("scipy")
DOCS = Path(__file__).resolve().parents[2] / "docs"
STUDY = DOCS / "studies" / "fashion" / "report"
METRICS = ("saco", "faithfulness_correlation", "pixel_flipping", "inside")


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    higher = flat(store.settings(STUDY)["metrics"])
    return analyse(store.read(STUDY), higher, ("transmm", "fga", "block_x_gradient"), resamples=0)


def test_the_table(analysis: Analysis) -> None:
    lines = (DOCS / "faithfulness.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith(("| `", "| **`"))]
    cells = [[name.split("`")[1], *(number.strip() for number in numbers)] for name, *numbers in rows]
    means = {(one.method, one.metric): one.mean for one in analysis.summaries}
    assert {name for name, *_ in cells} == {one.method for one in analysis.summaries}
    for name, *numbers in cells:
        assert numbers == [f"{means[name, metric]:.3f}" for metric in METRICS]


def test_what_the_page_claims(analysis: Analysis) -> None:
    """block_x_gradient is better than TransMM and than FGA as published on all four metrics, p < 0.001 after Holm."""
    found = {(one.method, one.baseline, one.metric): one for one in analysis.comparisons}
    for metric in METRICS:
        for baseline in ("transmm", "fga"):
            one = found["block_x_gradient", baseline, metric]
            assert one.verdict == "better" and one.wilcoxon_holm < 0.001
    gated = found["block_x_gradient_gated_no_sae", "block_x_gradient", "saco"].gain
    assert gated > found["block_x_gradient_gated", "block_x_gradient", "saco"].gain > 0
    settings = store.settings(STUDY)
    assert settings["split"] == "report" and settings["items"] >= 2000
