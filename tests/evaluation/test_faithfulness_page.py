"""The numbers and claims of docs/faithfulness.md are those of the rows beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fga_fast.assets import fashion_model, fashion_saes
from fga_fast.evaluation import store
from fga_fast.evaluation.measures import flat
from fga_fast.evaluation.settings import weights_of
from fga_fast.evaluation.statistics import Analysis, Comparison, analyse

pytest.importorskip("pyarrow")
pytest.importorskip("scipy")
DOCS = Path(__file__).resolve().parents[2] / "docs"
STUDIES = DOCS / "studies"
METRICS = ("saco", "faithfulness_correlation", "pixel_flipping", "inside")
PUBLISHED = ("transmm", "fga")


@pytest.fixture(scope="module")
def studies() -> dict[str, Analysis]:
    def analysed(folder: Path) -> Analysis:
        baselines = (*PUBLISHED, "block_x_gradient", "block_x_gradient_gated")
        return analyse(store.read(folder), flat(store.settings(folder)["metrics"]), baselines, resamples=0)

    return {name: analysed(STUDIES / name / "report") for name in ("fashion", "solar")}


def rows() -> Iterator[tuple[str, list[str]]]:
    """Method and numbers of each row of the page's table."""
    for line in (DOCS / "faithfulness.md").read_text(encoding="utf-8").splitlines():
        if line.startswith(("| `", "| **`")):
            name, *numbers = (cell.strip() for cell in line.strip("|").split("|"))
            yield name.split("`")[1], numbers


def test_the_table(studies: dict[str, Analysis]) -> None:
    means = {(name, one.method, one.metric): one.mean for name, found in studies.items() for one in found.summaries}
    columns = [("fashion", metric) for metric in METRICS] + [("solar", metric) for metric in METRICS[:3]]
    shown = dict(rows())
    assert {*PUBLISHED, "block_x_gradient", "block_x_gradient_gated_no_sae", "fga_no_sae_centred"} <= shown.keys()
    for method, numbers in shown.items():
        wanted = [means.get((study, method, metric)) for study, metric in columns]
        assert numbers == ["" if mean is None else f"{mean:.3f}" for mean in wanted], method


def compared(analysis: Analysis) -> dict[tuple[str, str, str], Comparison]:
    return {(one.method, one.baseline, one.metric): one for one in analysis.comparisons}


def test_the_runs_are_what_the_page_says(studies: dict[str, Analysis]) -> None:
    fashion, solar = (store.settings(STUDIES / name / "report") for name in ("fashion", "solar"))
    assert fashion["split"] == solar["split"] == "report"
    assert fashion["items"] >= 2000 and solar["items"] == 120
    # The shipped model and SAEs.
    assert fashion["weights"] == weights_of(fashion_model())
    assert [one.split(",")[0] for one in fashion["saes"].values()] == [
        weights_of(sae) for sae in fashion_saes().values()
    ]
    for name in ("fashion", "solar"):
        tuned = store.read(STUDIES / name / "tune")
        reported = store.read(STUDIES / name / "report")
        assert not {*tuned.column("image").to_pylist()} & {*reported.column("image").to_pylist()}


DEFAULTS = ("block_x_gradient", "block_x_gradient_gated")


@pytest.mark.parametrize("default", DEFAULTS)
def test_the_defaults_are_better_than_transmm_on_both_models(studies: dict[str, Analysis], default: str) -> None:
    fashion, solar = compared(studies["fashion"]), compared(studies["solar"])
    for metric in METRICS:
        one = fashion[default, "transmm", metric]
        assert one.verdict == "better" and one.wilcoxon_holm < 0.001
    for metric in METRICS[:3]:
        assert solar[default, "transmm", metric].verdict == "better"
    assert solar["block_x_gradient", "transmm", "saco"].wilcoxon_holm < 0.001
    assert solar["block_x_gradient", "transmm", "faithfulness_correlation"].wilcoxon_holm < 0.001


@pytest.mark.parametrize("default", DEFAULTS)
def test_and_than_fga_as_published_on_one(studies: dict[str, Analysis], default: str) -> None:
    fashion, solar = compared(studies["fashion"]), compared(studies["solar"])
    for metric in METRICS:
        one = fashion[default, "fga", metric]
        assert one.verdict == "better" and one.wilcoxon_holm < 0.001
    for metric in METRICS[:3]:
        one = solar[default, "fga", metric]
        assert one.verdict == "open" and one.gain > 0


def test_gates_cost_correlation(studies: dict[str, Analysis]) -> None:
    for found in map(compared, studies.values()):
        assert found["block_x_gradient_gated", "block_x_gradient", "faithfulness_correlation"].verdict == "worse"


def test_fga_on_solar(studies: dict[str, Analysis]) -> None:
    solar = compared(studies["solar"])
    for metric in METRICS[:3]:
        one = solar["fga", "transmm", metric]
        assert one.verdict == "better" and one.wilcoxon_holm < 0.001
        assert solar["fga_no_sae_centred", "fga", metric].verdict == "open"
    assert solar["fga_shuffled", "fga", "faithfulness_correlation"].verdict == "worse"
