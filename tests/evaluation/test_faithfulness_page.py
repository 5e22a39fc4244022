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


def analysed(study: str, run: str = "report") -> Analysis:
    folder, baselines = STUDIES / study / run, (*PUBLISHED, "block_x_gradient", "block_x_gradient_gated")
    return analyse(store.read(folder), flat(store.settings(folder)["metrics"]), baselines, resamples=0)


@pytest.fixture(scope="module")
def studies() -> dict[str, Analysis]:
    return {name: analysed(name) for name in ("fashion", "solar")}


def rows(columns: int) -> Iterator[tuple[str, list[str]]]:
    """Method and numbers of each row of the page's table with so many columns of numbers."""
    for line in (DOCS / "faithfulness.md").read_text(encoding="utf-8").splitlines():
        if line.startswith(("| `", "| **`")):
            name, *numbers = (cell.strip() for cell in line.strip("|").split("|"))
            if len(numbers) == columns:
                yield name.split("`")[1], numbers


def test_the_table(studies: dict[str, Analysis]) -> None:
    means = {(name, one.method, one.metric): one.mean for name, found in studies.items() for one in found.summaries}
    columns = [("fashion", metric) for metric in METRICS] + [("solar", metric) for metric in METRICS[:3]]
    shown = dict(rows(len(columns)))
    assert {*PUBLISHED, "block_x_gradient", "block_x_gradient_gated_no_sae", "fga_no_sae_centred"} <= shown.keys()
    for method, numbers in shown.items():
        wanted = [means.get((study, method, metric)) for study, metric in columns]
        assert numbers == ["" if mean is None else f"{mean:.3f}" for mean in wanted], method


def test_the_other_metrics() -> None:
    found = analysed("fashion", "others")
    metrics = list(dict.fromkeys(one.metric for one in found.summaries))
    means = {(one.method, one.metric): one.mean for one in found.summaries}
    shown = dict(rows(len(metrics)))
    assert {*PUBLISHED, *DEFAULTS, "random"} <= shown.keys()
    for method, numbers in shown.items():
        assert numbers == [f"{means[method, metric]:.3f}" for metric in metrics], method
    against = compared(found)
    for metric in ("deletion", "road_most_first", "road_least_first", "randomisation_whole"):
        for baseline in PUBLISHED:
            one = against["block_x_gradient", baseline, metric]
            assert one.verdict == "better" and one.wilcoxon_holm < (0.021 if "least" in metric else 0.001)
    for metric in ("insertion", "sensitivity"):
        assert against["block_x_gradient", "transmm", metric].verdict == "open"
    assert against["block_x_gradient", "fga", "insertion"].verdict == "open"
    assert against["fga", "transmm", "sensitivity"].wilcoxon_holm < 0.001
    assert against["block_x_gradient_gated", "transmm", "sensitivity"].verdict == "worse"


def test_the_other_metrics_on_few_cells() -> None:
    analysis = analysed("solar", "others")
    found = compared(analysis)
    means = {(one.method, one.metric): one.mean for one in analysis.summaries}
    assert found["fga", "transmm", "insertion"].verdict == "better"
    shown = [f"{means[method, 'sensitivity']:.3f}" for method in ("block_x_gradient", "fga", "transmm")]
    assert shown == ["0.053", "0.011", "0.002"]
    for baseline in PUBLISHED:
        gains = {metric: one.gain for (method, base, metric), one in found.items() if (method, base) == (
            "block_x_gradient", baseline)}  # fmt: skip
        assert found["block_x_gradient", baseline, "sensitivity"].verdict == "worse"
        assert min(gains["insertion"], gains["deletion"], gains["road_most_first"]) > 0 > gains["road_least_first"]
        for metric in ("insertion", "deletion", "road_most_first", "road_least_first", "randomisation_whole"):
            assert found["block_x_gradient", baseline, metric].verdict == "open"


def test_the_new_cells() -> None:
    """They were in no run before; the default is better than TransMM, and under two of three metrics than FGA."""
    new = {*store.read(STUDIES / "solar" / "confirm").column("image").to_pylist()}
    for run in ("tune", "report"):
        assert not new & {*store.read(STUDIES / "solar" / run).column("image").to_pylist()}
    found = compared(analysed("solar", "confirm"))
    assert len(new) == 339 and len(found) == 9
    for metric in METRICS[:3]:
        one = found["block_x_gradient", "transmm", metric]
        assert one.verdict == "better" and one.wilcoxon_holm < 0.001
    for metric in ("saco", "pixel_flipping"):
        one = found["block_x_gradient", "fga", metric]
        assert one.verdict == "better" and one.wilcoxon_holm < 0.001
    assert found["block_x_gradient", "fga", "faithfulness_correlation"].verdict == "open"


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
def test_and_than_fga_as_published_on_fashion(studies: dict[str, Analysis], default: str) -> None:
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
