"""Statistics against scipy called by hand, against numbers worked out on paper, and by simulation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fga_fast.evaluation import statistics as st
from fga_fast.evaluation.store import Row, _schema

scipy = pytest.importorskip("scipy.stats")
arrow = pytest.importorskip("pyarrow")

Values = dict[str, dict[str, list[float]]]  # metric -> method -> a value an image


def row(image: str, method: str, metric: str, value: float, **other: Any) -> Row:
    usual = {"key": image, "image": image, "half": "report", "seed": 0, "target": 1, "error": None}
    return Row(**{**usual, "method": method, "metric": metric, "value": value, **other})  # type: ignore[arg-type]


def table(rows: list[Row]) -> Any:
    return arrow.table({name: [getattr(one, name) for one in rows] for name in Row._fields}, schema=_schema())


def made(values: Values) -> Any:
    return table([
        row(f"image {n}", method, metric, value)
        for metric, methods in values.items()
        for method, numbers in methods.items()
        for n, value in enumerate(numbers)
    ])  # fmt: skip


def drawn(count: int, seed: int = 0) -> Values:
    generator = np.random.default_rng(seed)
    base = generator.normal(size=count)
    return {
        "up": {"transmm": base.tolist(), "fga": (base + generator.normal(0.4, 1, count)).tolist(),
               "own": (base + generator.normal(0, 1, count)).tolist()},
        "down": {"transmm": base.tolist(), "fga": (base + generator.normal(-0.4, 1, count)).tolist(),
                 "own": (base + generator.normal(0.6, 1, count)).tolist()},
    }  # fmt: skip


def test_against_scipy_by_hand() -> None:
    values = drawn(40)
    found = st.analyse(made(values), {"up": True, "down": False}, resamples=500, seed=4)
    assert [(one.method, one.metric) for one in found.summaries] == [
        (method, metric) for metric in ("up", "down") for method in ("transmm", "fga", "own")
    ]
    pairs = [("fga", "transmm"), ("own", "transmm"), ("own", "fga")]
    assert [(one.method, one.baseline, one.metric) for one in found.comparisons] == [
        (*pair, metric) for metric in ("up", "down") for pair in pairs
    ]
    for one in found.comparisons:
        a, b = (np.array(values[one.metric][name]) for name in (one.method, one.baseline))
        gain = a - b if one.metric == "up" else b - a
        assert one.gain == pytest.approx(gain.mean(), rel=1e-12)
        assert one.wilcoxon == scipy.wilcoxon(gain).pvalue
        assert one.t == pytest.approx(scipy.ttest_rel(a, b).pvalue, rel=1e-9)
        plus, minus = (scipy.rankdata(abs(gain))[sign * gain > 0].sum() for sign in (1, -1))
        assert one.rank_biserial == pytest.approx((plus - minus) / (plus + minus), rel=1e-12)
        assert one.dz == pytest.approx(gain.mean() / gain.std(ddof=1), rel=1e-12)
        assert (one.images, one.missing, one.zeros, one.ties) == (40, 0, 0, 0)
        with np.errstate(all="raise"):
            want = scipy.bootstrap((gain,), np.mean, n_resamples=500, random_state=np.random.default_rng(4))
        assert one.interval == pytest.approx(tuple(want.confidence_interval), rel=1e-9)
    assert [one.wilcoxon_holm for one in found.comparisons] == pytest.approx(
        st.holm([one.wilcoxon for one in found.comparisons])
    )
    mean = np.mean(values["down"]["own"])
    assert found.summaries[-1].mean == pytest.approx(mean)
    assert found.summaries[-1].interval.low < mean < found.summaries[-1].interval.high


def test_holm_by_hand() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04: times 4, 3, 2, 1 they are 0.02, 0.03, 0.06, 0.04, and never fall.
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([0.02, math.nan]) == pytest.approx([0.04, 1.0])  # what could not be tested counts
    assert st.holm([0.5, 0.6]) == [1.0, 1.0]
    assert st.holm([]) == []


def test_verdicts() -> None:
    better = st.analyse(made(drawn(400)), {"up": True, "down": False}, resamples=0).comparisons
    verdicts = {(one.method, one.baseline, one.metric): one.verdict for one in better}
    assert verdicts["fga", "transmm", "up"] == verdicts["fga", "transmm", "down"] == "better"
    assert verdicts["own", "transmm", "down"] == "worse" and verdicts["own", "transmm", "up"] == "open"


def test_a_verdict_does_not_contradict_the_mean() -> None:
    """90 images a little better, 10 a lot worse: ranks say better, the mean says worse, so nothing is said."""
    better = [0.5 + 0.001 * n for n in range(90)] + [-5.0 - n for n in range(10)]
    values = {"up": {"fga": better, "transmm": [0.4] * 100}}
    (one,) = st.analyse(made(values), {"up": True}, ("transmm",), resamples=0).comparisons
    assert one.wilcoxon_holm < 0.001 and one.rank_biserial > 0 > one.gain
    assert one.verdict == "open"


def test_an_image_counts_once() -> None:
    """Two questions with two seeds each are averaged, over those for which both methods have a value."""
    rows = []
    for n in range(6):
        for key, seed, a, b in (("x", 0, 1.0 + n, 0.5), ("x", 1, 2.0, 1.0), ("y", 0, 9.0, math.nan)):
            name = f"{n}{key}"
            rows += [row(f"{n}", m, "up", v, key=name, seed=seed) for m, v in (("fga", a), ("transmm", b))]
    (one,) = st.analyse(table(rows), {"up": True}, resamples=0).comparisons
    gain = np.array([((1 + n - 0.5) + 1.0) / 2 for n in range(6)])
    assert (one.images, one.missing) == (6, 0)
    assert one.gain == pytest.approx(gain.mean())
    assert one.wilcoxon == scipy.wilcoxon(gain).pvalue


def test_missing_equal_and_tied_images() -> None:
    base = [0.0] * 8
    mine = [0.3, -0.3, 0.5, 0.0, 1e-17, 0.2, math.nan, math.inf]
    values = made({"up": {"transmm": [*base[:4], 0.1 * 3, *base[5:]], "fga": [*mine[:4], 0.3, *mine[5:]]}})
    (one,) = st.analyse(values, {"up": True}).comparisons
    assert (one.images, one.missing, one.zeros, one.ties) == (6, 2, 2, 2)  # 0.1 * 3 is 0.3 but for rounding
    assert one.wilcoxon == scipy.wilcoxon([0.3, -0.3, 0.5, 0.2]).pvalue
    two = made({"up": {"transmm": base, "fga": mine}, "down": {"transmm": base}})
    found = st.analyse(two, {"up": True, "down": False}, resamples=0)
    # The table is whole: the method without a value under one metric stands in it, and counts in the correction.
    assert [(one.metric, one.images, one.wilcoxon_holm) for one in found.comparisons] == [
        ("up", 6, pytest.approx(min(1, 2 * found.comparisons[0].wilcoxon))), ("down", 0, 1.0)
    ]  # fmt: skip
    assert [(one.method, one.metric, one.images) for one in found.summaries][-1] == ("fga", "down", 0)
    errors = table([row("a", "fga", "up", math.nan, error="no"), row("a", "transmm", "up", 1.0)])
    found = st.analyse(errors, {"up": True})
    assert not found.comparisons and [one.method for one in found.summaries] == ["transmm"]


def test_the_family_is_the_whole_table() -> None:
    """Under every metric every method with every baseline, two baselines only once; corrected over these alone."""
    generator = np.random.default_rng(3)
    values = {
        metric: {name: generator.normal(shift, 1, 30).tolist() for name, shift in (("transmm", 0), ("fga", 0.5),
                                                                                   ("a", 1), ("b", 1.5))}
        for metric in ("up", "down", "third")
    }  # fmt: skip
    for n in range(30):
        values["third"]["b"][n] = math.nan
    found = st.analyse(made(values), dict.fromkeys(values, True), resamples=0).comparisons
    pairs = {("fga", "transmm"), ("a", "transmm"), ("b", "transmm"), ("a", "fga"), ("b", "fga")}
    assert {(one.method, one.baseline, one.metric) for one in found} == {
        (*pair, metric) for pair in pairs for metric in values
    }
    assert len(found) == 15 and sum(math.isnan(one.wilcoxon) for one in found) == 2
    by_p = sorted(found, key=lambda one: 1.0 if math.isnan(one.wilcoxon) else one.wilcoxon)
    least = 0.0
    for rank, one in enumerate(by_p):
        least = max(least, min(1.0, (15 - rank) * (1.0 if math.isnan(one.wilcoxon) else one.wilcoxon)))
        assert one.wilcoxon_holm == pytest.approx(least)
    assert by_p[0].wilcoxon_holm == pytest.approx(15 * by_p[0].wilcoxon) and by_p[0].wilcoxon_holm < 0.05


def test_degenerate_tables() -> None:
    same = st.analyse(made({"up": {"transmm": [1.0, 2.0], "fga": [1.0, 2.0]}}), {"up": True}).comparisons[0]
    assert (same.wilcoxon, same.t, same.dz, same.rank_biserial) == (1, 1, 0, 0)
    assert same.interval == (0, 0) and same.needed == (math.inf, math.inf) and same.verdict == "open"
    shifted = st.analyse(made({"up": {"transmm": [1.0, 2.0], "fga": [2.0, 3.0]}}), {"up": True}).comparisons[0]
    assert math.isnan(shifted.t) and math.isnan(shifted.dz) and shifted.t_holm == 1 and shifted.gain == 1
    alone = st.analyse(made({"up": {"transmm": [1.0], "fga": [2.0]}}), {"up": True}).comparisons[0]
    assert math.isnan(alone.interval.low) and alone.wilcoxon == 1 and alone.images == 1
    nothing = st.analyse(made({"up": {"transmm": [math.nan], "fga": [2.0]}}), {"up": True}).comparisons[0]
    assert nothing.images == 0 and math.isnan(nothing.wilcoxon) and nothing.wilcoxon_holm == 1
    with pytest.raises(ValueError, match="higher: expected a direction for each metric, got none for up"):
        st.analyse(made({"up": {"transmm": [1.0]}}), {})


def test_halves_and_baselines() -> None:
    rows = [
        row(f"{n}", m, "up", n * k, half=("tune", "report")[n % 2]) for n in range(9) for k, m in ((1, "a"), (2, "b"))
    ]
    assert st.analyse(table(rows), {"up": True}, half="tune").summaries[0].images == 5
    assert not st.analyse(table(rows), {"up": True}).comparisons
    (one,) = st.analyse(table(rows), {"up": True}, ("b", "gone"), resamples=0).comparisons
    assert (one.method, one.baseline) == ("a", "b")


def test_false_positives_of_a_whole_table() -> None:
    """Of tables in which nothing differs, about one in twenty may say that something does, not one in two."""
    generator = np.random.default_rng(1)
    wrong = [0, 0]
    uncorrected = 0
    for _ in range(200):
        base = generator.normal(size=(2, 1, 30))
        noise = base + generator.normal(size=(2, 4, 30))  # 2 metrics, 4 methods, 30 images
        values = [
            st.Values([*map(str, range(30))], np.arange(30), dict(zip("abcd", one, strict=True))) for one in noise
        ]
        raw = [st.compare(one, (m, "a"), "up", True, resamples=0) for one in values for m in "bcd"]
        found = st.corrected(raw)
        wrong[0] += any(one.wilcoxon_holm < 0.05 for one in found)
        wrong[1] += any(one.t_holm < 0.05 for one in found)
        uncorrected += any(one.wilcoxon < 0.05 for one in raw)
    assert max(wrong) <= 18  # 200 x 5 % = 10, and 2.6 standard deviations
    assert uncorrected >= 25


def test_how_many_images_are_needed() -> None:
    """At the number of images that is named, four of five simulated studies find the effect."""
    generator = np.random.default_rng(2)
    for dz, level in ((0.5, 0.05), (0.8, 0.01)):
        needed = st.images_needed(dz, level)
        tests = ((needed.t, scipy.ttest_1samp, {"popmean": 0}), (needed.wilcoxon, scipy.wilcoxon, {}))
        for n, test, given in tests:
            p = test(generator.normal(dz, 1, (1000, int(n))), axis=1, **given).pvalue
            assert 0.76 <= (p < level).mean() <= 0.86
    assert st.images_needed(0.5) == (34, 35)  # G*Power says 34 for the paired t-test
    assert st.images_needed(5, 0.05 / 81).wilcoxon == st.fewest(0.05 / 81) == 12
    assert scipy.wilcoxon(np.arange(1, 13)).pvalue < 0.05 / 81 < scipy.wilcoxon(np.arange(1, 12)).pvalue
    assert math.isnan(st.images_needed(math.nan).t)
    with pytest.raises(ValueError, match="level, power: expected numbers between 0 and 1, got 2 and"):
        st.images_needed(0.5, 2)


def test_intervals_of_many_images_are_percentiles() -> None:
    values = np.random.default_rng(0).exponential(size=st.MOST_BCA + 1)
    few, many = st.interval(values[:-1], 300), st.interval(values, 300)
    for data, method, found in ((values[:-1], "BCa", few), (values, "percentile", many)):
        want = scipy.bootstrap((data,), np.mean, n_resamples=300, method=method, random_state=np.random.default_rng(0))
        assert found == pytest.approx(tuple(want.confidence_interval), rel=1e-9)
    assert st.interval(values, 0) == pytest.approx((math.nan, math.nan), nan_ok=True)
