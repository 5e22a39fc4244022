"""What both reports say: sentences, tables of words, and numbers to read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fga_fast.evaluation.statistics import MOST_BCA, Analysis, Comparison, Summary, fewest

# Methods that cannot know the answer, or lack the part that is said to matter.
CONTROLS: Mapping[str, str] = {
    "random": "relevance drawn by chance, which any method must beat",
    "fga_random_gates": "FGA with gates drawn by chance",
    "fga_shuffled": "FGA whose SAE decoders have their rows in another order, so features mean something else",
    "fga_no_sae": "FGA with gates of the gradient times the stream, without the SAE",
    "fga_no_sae_centred": "the same, less the mean of the patches",
    "block_x_gradient_gated_shuffled": "block x gradient with gates of shuffled decoders",
    "block_x_gradient_gated_no_sae": "block x gradient with gates of the gradient times the stream, without the SAE",
    "fga_activation_only": "FGA with gates of the features alone, without their gradient",
    "fga_gradient_only": "FGA with gates of the gradient alone, without the features",
}


class Facts(NamedTuple):
    """Everything that a report says, apart from pictures."""

    analysis: Analysis
    settings: Mapping[str, Any]  # of the run
    command: str
    controls: Mapping[str, str]  # those that were run
    errors: Counter[str]  # reason -> rows


class Cell(NamedTuple):
    """A method under a metric, in words."""

    mean: str
    interval: str
    images: str  # n = ..., or nothing where all cells have the same
    against: str  # Holm's p against the first baseline
    best: bool


def number(value: float) -> str:
    """Three digits, or a dash for no number."""
    if not math.isfinite(value):
        return "–"
    text = f"{value + 0.0:.3g}"
    return f"{value:.0f}" if "e+" in text else text


def probability(p: float) -> str:
    """p to read."""
    if math.isnan(p):
        return "–"
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def metrics_of(facts: Facts) -> list[str]:
    """The metrics that have values, in order."""
    return list(dict.fromkeys(one.metric for one in facts.analysis.summaries))


def methods_of(facts: Facts) -> list[str]:
    """The methods that have values, in order."""
    return list(dict.fromkeys(one.method for one in facts.analysis.summaries))


def heading(metric: str, higher: bool) -> str:
    """A metric's name with its better direction."""
    return f"{metric} {'↑' if higher else '↓'}"


def cells(facts: Facts) -> dict[tuple[str, str], Cell]:
    """(method, metric) -> what the table of means says."""
    best = best_of(facts.analysis.summaries)
    first = facts.analysis.baselines[0] if facts.analysis.baselines else None
    against = {
        (one.method, one.metric): probability(one.wilcoxon_holm)
        for one in facts.analysis.comparisons
        if one.baseline == first
    }
    found, differ = {}, len({one.images for one in facts.analysis.summaries}) > 1
    for one in facts.analysis.summaries:
        low, high = map(number, one.interval)
        word = "baseline" if one.method == first else against.get((one.method, one.metric), "")
        found[one.method, one.metric] = Cell(
            number(one.mean), f"[{low}, {high}]", counted([one.images]) if differ else "", word,
            one.method in best[one.metric],
        )  # fmt: skip
    return found


def counted(images: Sequence[int]) -> str:
    """The number of images behind means, or its range."""
    low, high = min(images), max(images)
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def means_note(facts: Facts) -> str:
    """How many images the means are over, for the table of means."""
    images = [one.images for one in facts.analysis.summaries]
    if not images:
        return ""
    differ = len({*images}) > 1
    said = "n is the number of images with a value." if differ else f"Every mean is over {counted(images)} images."
    if any(one.missing for one in facts.analysis.summaries):
        said += " The means of one column may be over different images; comparisons take only images with both values."
    return said


def best_of(summaries: Sequence[Summary]) -> dict[str, set[str]]:
    """Metric -> the methods with its best mean."""
    found: dict[str, set[str]] = {}
    for metric in dict.fromkeys(one.metric for one in summaries):
        known = [one for one in summaries if one.metric == metric and math.isfinite(one.mean)]
        top = [one.mean if one.higher else -one.mean for one in known]
        found[metric] = {one.method for one, mean in zip(known, top, strict=True) if mean == max(top)}
    return found


COLUMNS = (
    "method", "baseline", "metric", "verdict", "gain", "95 % interval", "Holm, Wilcoxon", "Holm, t", "rank-biserial",
    "dz", "images", "without pair", "equal", "ties", "images needed (Wilcoxon / t)",
)  # fmt: skip


def row(one: Comparison) -> list[str]:
    """A comparison in words, one for each of `COLUMNS`."""
    low, high = map(number, one.interval)
    needed = " / ".join("∞" if math.isinf(n) else number(n) for n in (one.needed.wilcoxon, one.needed.t))
    return [
        one.method, one.baseline, one.metric, one.verdict, number(one.gain), f"[{low}, {high}]",
        probability(one.wilcoxon_holm), probability(one.t_holm), number(one.rank_biserial), number(one.dz),
        str(one.images), str(one.missing), str(one.zeros), str(one.ties), needed,
    ]  # fmt: skip


def sentences(facts: Facts) -> dict[str, str]:
    """Title -> what must be known to read the numbers."""
    settings, analysis = facts.settings, facts.analysis
    seeds = f"seed{'s' if len(settings['seeds']) > 1 else ''} {', '.join(map(str, settings['seeds']))}"
    tests = len(analysis.comparisons)
    said = {
        "Split": _split(settings),
        "Images": (
            f"n = {settings['images']} images with {settings['items']} questions about them, {seeds}. Values of "
            "one image (several seeds, several questions) are averaged before any test, so an image counts once."
        ),
        "Tests": (
            f"Against {' and '.join(analysis.baselines) or 'no baseline'}. Wilcoxon's signed-rank test over images "
            f"decides, two-sided, at 5 %. Its p is corrected by Holm over all {tests} comparisons of the table: under "
            "every metric every method with every baseline, though baselines only once with each other. A comparison "
            "that cannot be tested, for lack of values, counts among them with p = 1. The paired t-test is a check, "
            "corrected in the same way on its own; it decides nothing. A gain above 0 is better than the baseline, "
            "whatever the metric's direction."
        ),
        "Intervals": (
            f"95 % bootstrap over images (BCa up to {MOST_BCA} images, percentiles beyond), not corrected for the "
            "number of comparisons."
        ),
        "Effect sizes": (
            "rank-biserial correlation, from -1 to 1 (1: better on every image), and Cohen's dz, the mean gain over "
            "its standard deviation."
        ),
        "Equal, ties, without pair": (
            "Images on which both methods have the same value are left out of Wilcoxon's test, and counted as equal. "
            "Ties are images whose gains have the same size, and share a rank. An image without a pair of values, for "
            "an error or an undefined metric, is in no test."
        ),
        "Images needed": (
            "so many would show an effect of this size in four of five studies, at the level of Holm's first step, "
            f"5 % / {max(tests, 1)}. The effect is an estimate, so the number is a rough one."
        ),
        "Controls": _controls(facts.controls),
    }
    least = fewest(0.05 / max(tests, 1))
    if tests and max(one.images for one in analysis.comparisons) < least:
        said["Too few images"] = (
            f"{tests} comparisons need at least {least} images before any of them can be better or worse by this test, "
            f"however clear it is. So 'open' says nothing here; give more images, or ask fewer questions."
        )
    if facts.errors:
        said["Errors"] = f"{facts.errors.total()} row(s) are errors: " + "; ".join(
            f"{' '.join(reason.split())} ({count})" for reason, count in facts.errors.most_common(5)
        )
    else:
        said["Errors"] = "none: every image, method and metric gave a value."
    return said


def _split(settings: Mapping[str, Any]) -> str:
    halves = "A hash of an image's name puts it into one of two halves, the same in every run."
    if settings["split"] == "report":
        return f"{halves} These numbers are from the half 'report'. Choose settings on the half 'tune' only."
    if settings["split"] == "tune":
        return f"{halves} These numbers are from the half 'tune': choose settings by them, publish those of 'report'."
    return (
        f"{halves} These numbers are from both halves. So they are fair only if nothing was chosen by looking at these "
        "images."
    )


def _controls(controls: Mapping[str, str]) -> str:
    if not controls:
        return (
            "none was run, so nothing here says what a method without knowledge reaches; add random, and for FGA "
            "fga_shuffled."
        )
    listed = "; ".join(f"{name}: {what}" for name, what in controls.items())
    return f"{listed}. A method that is not better than its control owes its numbers to something else."
