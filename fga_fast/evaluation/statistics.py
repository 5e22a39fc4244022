"""From values to statements: means with intervals, tests against baselines, effect sizes, how many images are needed.

One image counts once: values of several seeds, or of several questions about an image, are averaged before any test.
A comparison takes the image's seeds and questions for which both methods have a value. `gain` is the difference in the
direction that is better, so above 0 the method is better than the baseline whatever the metric.

Two tests see each comparison. The Wilcoxon signed-rank test decides. The paired t-test stands beside it as a check and
is corrected on its own. Holm's correction is over all comparisons of the table, which are its family: under every
metric every method with every baseline, though two baselines only once with each other. A comparison that cannot be
tested, such as one without values, counts with p = 1, so the correction never gets weaker. A method or metric without
any value is not in the table.

Sources: Wilcoxon, Biometrics Bulletin 1945; Holm, Scandinavian Journal of Statistics 1979; Kerby, Comprehensive
Psychology 2014 (rank-biserial correlation of pairs); Efron, JASA 1987 (BCa); Hodges and Lehmann, Annals of Mathematical
Statistics 1956 (efficiency of the Wilcoxon test).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fga_fast.dataset.extras import need

Numbers: TypeAlias = npt.NDArray[np.float64]
BASELINES = ("transmm", "fga")
MOST_BCA = 1000  # images; beyond, the jackknife of BCa costs much and percentiles say the same
_ROUNDING = 1e-12  # differences below this share of the values are none


class Values(NamedTuple):
    """Values of one metric."""

    images: list[str]  # n: what counts as one image
    owner: npt.NDArray[np.int64]  # [u]: the image of each question, that is of each item and seed
    of: dict[str, Numbers]  # method -> [u], NaN where there is none


class Interval(NamedTuple):
    """Where the mean is, with 95 % confidence; NaN for fewer than two images."""

    low: float
    high: float


class Summary(NamedTuple):
    """One method under one metric."""

    method: str
    metric: str
    higher: bool  # more is better
    images: int
    missing: int  # images without a value
    mean: float
    interval: Interval


class Comparison(NamedTuple):
    """One method against one baseline under one metric."""

    method: str
    baseline: str
    metric: str
    images: int
    missing: int  # images without a pair of values
    zeros: int  # images on which both are equal; Wilcoxon's test leaves them out
    ties: int  # images whose difference has the size of another's, which share a rank
    gain: float
    interval: Interval
    wilcoxon: float  # p
    t: float  # p
    wilcoxon_holm: float  # corrected over the table
    t_holm: float
    rank_biserial: float  # from -1 to 1; 1: the method is better on all images
    dz: float  # Cohen's: mean over standard deviation of the gains
    needed: Needed

    @property
    def verdict(self) -> str:
        """ "better" or "worse" by the corrected Wilcoxon test at 5 %; else, or if the mean contradicts it, "open"."""
        if not self.wilcoxon_holm < 0.05 or self.rank_biserial * self.gain < 0:
            return "open"
        return "better" if self.rank_biserial > 0 else "worse"


class Needed(NamedTuple):
    """How many images a test needs to find an effect of this size; inf for none."""

    t: float
    wilcoxon: float


class Analysis(NamedTuple):
    """All that a report says."""

    summaries: list[Summary]
    comparisons: list[Comparison]  # the whole family of Holm's correction, and nothing else
    baselines: tuple[str, ...]


def analyse(
    table: Any, higher: Mapping[str, bool], baselines: Sequence[str] = BASELINES, *, resamples: int = 2000,
    seed: int = 0, half: str | None = None,
) -> Analysis:  # fmt: skip
    """Summaries and comparisons of a table of values.

    Args:
        table: what `store.read` gives.
        higher: metric -> whether more is better.
        baselines: methods that all others are compared with; those that were not run are left out. Of two baselines
            the second is compared with the first, not also the first with the second.
        resamples: of the bootstrap; 0 leaves intervals out.
        seed: of the bootstrap.
        half: take the images of one half only.

    Raises:
        ValueError: `higher` lacks a metric of the table.
        ImportError: scipy is missing.
    """
    values = pivot(table, half)
    for metric in values:
        if metric not in higher:
            raise ValueError(f"higher: expected a direction for each metric, got none for {metric}")
    methods = [*next(iter(values.values())).of] if values else []
    used = tuple(dict.fromkeys(name for name in baselines if name in methods))
    summaries = [
        summarise(values[metric], method, metric, higher[metric], resamples, seed)
        for metric in values for method in methods
    ]  # fmt: skip
    pairs = [
        (method, baseline)
        for place, baseline in enumerate(used)
        for method in methods
        if method != baseline and method not in used[:place]
    ]
    raw = [
        compare(values[metric], pair, metric, higher[metric], resamples, seed)
        for metric in values for pair in pairs
    ]  # fmt: skip
    return Analysis(summaries, corrected(raw), used)


def pivot(table: Any, half: str | None = None) -> dict[str, Values]:
    """Values by metric, of all methods that have any; both in the order of the table. Errors are left out."""
    columns = {name: table.column(name).to_numpy() for name in ("key", "image", "half", "seed", "value")}
    words = {name: np.asarray(table.column(name).to_pylist(), dtype=object) for name in ("method", "metric", "error")}
    kept = np.array([error is None for error in words["error"]], dtype=bool)
    if half is not None:
        kept &= columns["half"] == half
    images: dict[str, int] = {}
    questions: dict[tuple[str, int], int] = {}
    owner: list[int] = []
    places = np.empty(len(kept), dtype=np.int64)
    for row in np.flatnonzero(kept):
        question = (columns["key"][row], int(columns["seed"][row]))
        if question not in questions:
            questions[question] = len(questions)
            owner.append(images.setdefault(columns["image"][row], len(images)))
        places[row] = questions[question]
    found: dict[str, Values] = {}
    methods = dict.fromkeys(words["method"][kept])
    for metric in dict.fromkeys(words["metric"][kept]):
        of: dict[str, Numbers] = {}
        asked = kept & (words["metric"] == metric)
        for method in methods:
            rows = np.flatnonzero(asked & (words["method"] == method))
            of[method] = np.full(len(questions), np.nan)
            of[method][places[rows]] = columns["value"][rows]
        found[metric] = Values(list(images), np.array(owner, dtype=np.int64), of)
    return found


def per_image(values: Values, of: Numbers) -> Numbers:  # [u] -> [n]
    """The mean over an image's questions that have a value; NaN where none has."""
    there = np.isfinite(of)
    total = np.bincount(values.owner, np.where(there, of, 0.0), len(values.images))
    count = np.bincount(values.owner, there, len(values.images))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def gains(values: Values, pair: tuple[str, str], higher: bool) -> Numbers:  # -> [n]
    """How much better the first method is on each image; differences that are rounding are 0."""
    a, b = (values.of[name] for name in pair)
    difference = np.where(np.isfinite(a) & np.isfinite(b), a - b, np.nan)
    scale = np.maximum(np.abs(a), np.abs(b))
    difference = np.where(np.abs(difference) <= _ROUNDING * scale, 0.0, difference)
    return per_image(values, difference if higher else -difference)


def summarise(values: Values, method: str, metric: str, higher: bool, resamples: int = 2000, seed: int = 0) -> Summary:
    """Mean of a method under a metric, over images."""
    found = per_image(values, values.of[method])
    there = found[np.isfinite(found)]
    mean = float(there.mean()) if len(there) else math.nan
    missing = len(found) - len(there)
    return Summary(method, metric, higher, len(there), missing, mean, interval(there, resamples, seed))


def compare(
    values: Values, pair: tuple[str, str], metric: str, higher: bool, resamples: int = 2000, seed: int = 0
) -> Comparison:
    """Tests of one method against a baseline, not yet corrected."""
    found = gains(values, pair, higher)
    gain = found[np.isfinite(found)]
    sizes = np.abs(gain[gain != 0])
    _, counts = np.unique(sizes, return_counts=True)
    p_wilcoxon, p_t = wilcoxon(gain), paired_t(gain)
    dz = cohens_dz(gain)
    return Comparison(
        *pair, metric, len(gain), len(found) - len(gain), int((gain == 0).sum()), int(counts[counts > 1].sum()),
        float(gain.mean()) if len(gain) else math.nan, interval(gain, resamples, seed), p_wilcoxon, p_t, math.nan,
        math.nan, rank_biserial(gain), dz, images_needed(dz),
    )  # fmt: skip


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same comparisons with Holm's p, and with the images needed at the level of Holm's first step."""
    by_rank, by_t = holm([one.wilcoxon for one in comparisons]), holm([one.t for one in comparisons])
    level = 0.05 / max(len(comparisons), 1)
    return [
        one._replace(wilcoxon_holm=rank, t_holm=t, needed=images_needed(one.dz, level))
        for one, rank, t in zip(comparisons, by_rank, by_t, strict=True)
    ]


def holm(p: Sequence[float]) -> list[float]:
    """Holm's corrected p values; NaN, a test that could not be made, counts as 1."""
    known = [1.0 if math.isnan(one) else one for one in p]
    order = sorted(range(len(known)), key=known.__getitem__)
    found, least = [1.0] * len(known), 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(known) - rank) * known[place]))
        found[place] = least
    return found


def wilcoxon(gain: Numbers) -> float:
    """p of the signed-rank test, two-sided, without the zeros; 1 where all are zero, NaN without images."""
    if not len(gain):
        return math.nan
    if not gain.any():
        return 1.0
    return float(need("scipy.stats").wilcoxon(gain, zero_method="wilcox").pvalue)


def paired_t(gain: Numbers) -> float:
    """p of the t-test, two-sided; 1 where all are zero, NaN where all are the same otherwise, or fewer than two."""
    if len(gain) < 2:
        return math.nan
    if np.ptp(gain) == 0:
        return math.nan if gain[0] else 1.0
    return float(need("scipy.stats").ttest_1samp(gain, 0.0).pvalue)


def rank_biserial(gain: Numbers) -> float:
    """Ranks in favour less ranks against, over all ranks; 0 where all differences are zero."""
    sizes = gain[gain != 0]
    if not len(sizes):
        return 0.0 if len(gain) else math.nan
    ranks = need("scipy.stats").rankdata(np.abs(sizes))
    return float((ranks * np.sign(sizes)).sum() / ranks.sum())


def cohens_dz(gain: Numbers) -> float:
    """Mean over standard deviation; 0 where all are zero, NaN where they are all the same otherwise."""
    if len(gain) < 2:
        return math.nan
    if np.ptp(gain) == 0:
        return math.nan if gain[0] else 0.0
    return float(gain.mean() / gain.std(ddof=1))


def interval(values: Numbers, resamples: int = 2000, seed: int = 0) -> Interval:  # [n]
    """95 % bootstrap interval of the mean over images: BCa up to 1,000 images, percentiles beyond."""
    if len(values) < 2 or not resamples:
        return Interval(math.nan, math.nan)
    if np.ptp(values) == 0:
        return Interval(float(values[0]), float(values[0]))
    found = need("scipy.stats").bootstrap(
        (values,), np.mean, n_resamples=resamples, batch=max(1, 2**22 // len(values)), vectorized=True,
        method="BCa" if len(values) <= MOST_BCA else "percentile", random_state=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Interval(float(found.low), float(found.high))


def images_needed(dz: float, level: float = 0.05, power: float = 0.8) -> Needed:
    """How many images are needed to find an effect of size `dz` with probability `power`, two-sided.

    For the paired t-test n = ((z_(1 - level/2) + z_power) / dz)^2 + z_(1 - level/2)^2 / 2: the normal approximation,
    with the usual term for the standard deviation's being estimated. Wilcoxon's test needs pi / 3 as many where the
    differences are normal (asymptotic relative efficiency 0.955), fewer under heavy tails, and never more than
    1 / 0.864 as many; and at least as many as its smallest p needs, see `fewest`.

    Raises:
        ValueError: `level` or `power` is not between 0 and 1.
    """
    if not (0 < level < 1 and 0 < power < 1):
        raise ValueError(f"level, power: expected numbers between 0 and 1, got {level} and {power}")
    if math.isnan(dz) or dz == 0:
        return Needed(math.inf, math.inf) if dz == 0 else Needed(math.nan, math.nan)
    normal = need("scipy.stats").norm
    z = float(normal.ppf(1 - level / 2))
    n = ((z + float(normal.ppf(power))) / dz) ** 2 + z**2 / 2
    return Needed(float(math.ceil(n)), float(max(math.ceil(n * math.pi / 3), fewest(level))))


def fewest(level: float) -> int:
    """Images below which Wilcoxon's test cannot reach a level: if all n speak for one method, p is 2 / 2^n."""
    return math.ceil(1 - math.log2(level))
