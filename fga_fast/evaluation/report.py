"""What a finished run says, as one HTML file that needs no other file and no script, and as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fga_fast.evaluation import store, wording
from fga_fast.evaluation.examples import Example
from fga_fast.evaluation.measures import flat
from fga_fast.evaluation.page import report_page
from fga_fast.evaluation.statistics import BASELINES, analyse
from fga_fast.evaluation.wording import COLUMNS, CONTROLS, Facts
from fga_fast.io.atomic import atomic_write


class Written(NamedTuple):
    """Where the reports are, and what they say."""

    html: Path
    markdown: Path
    facts: Facts


def write(
    out: str | Path, *, baselines: Sequence[str] = BASELINES, controls: Mapping[str, str] = CONTROLS, command: str = "",
    examples: Sequence[Example] = (), resamples: int = 2000,
) -> Written:  # fmt: skip
    """Writes report.html and report.md beside values.parquet.

    Args:
        out: the folder of a complete run.
        baselines: methods that all others are compared with, as far as they were run.
        controls: method -> what it is, for methods that cannot know the answer; those that were not run are left out.
        command: what the run can be repeated with.
        examples: images with maps, see `examples.examples`.
        resamples: of the bootstrap.

    Raises:
        FileNotFoundError: the run is not complete.
    """
    out = Path(out)
    table = store.read(out)
    settings = store.settings(out)
    analysis = analyse(table, flat(settings["metrics"]), baselines, resamples=resamples)
    run = {name: what for name, what in controls.items() if name in settings["methods"]}
    reasons = Counter(error for error in table.column("error").to_pylist() if error is not None)
    facts = Facts(analysis, settings, command, run, reasons)
    html = atomic_write(out / "report.html", report_page(facts, examples).encode())
    return Written(html, atomic_write(out / "report.md", markdown(facts).encode()), facts)


def markdown(facts: Facts) -> str:
    """The report as text with tables."""
    metrics, found = wording.metrics_of(facts), wording.cells(facts)
    higher = {one.metric: one.higher for one in facts.analysis.summaries}
    lines = ["# Evaluation", "", *_table(["method", *(wording.heading(name, higher[name]) for name in metrics)], [
        [_named(method, facts), *(_cell(found[method, metric]) for metric in metrics)]
        for method in wording.methods_of(facts)
    ])]  # fmt: skip
    lines += ["", f"Bold: the best mean of a column. Brackets: 95 % interval of the mean. {wording.means_note(facts)}"]
    if facts.analysis.baselines:
        lines[-1] += f" p: against {facts.analysis.baselines[0]}, Wilcoxon's test, corrected by Holm."
    lines += ["", "## Comparisons", "", *_table(COLUMNS, [wording.row(one) for one in facts.analysis.comparisons])]
    lines += ["", "## How to read this", ""]
    lines += [f"- **{title}**: {text}" for title, text in wording.sentences(facts).items()]
    lines += ["", "## Settings", "", *_table(["setting", "value"], [
        [name, str(value).replace("|", "\\|")] for name, value in facts.settings.items()
    ])]  # fmt: skip
    if facts.command:
        lines += ["", "Repeat it with:", "", "```sh", facts.command, "```"]
    return "\n".join(lines) + "\n"


def _named(method: str, facts: Facts) -> str:
    return f"{method} (control)" if method in facts.controls else method


def _cell(cell: wording.Cell) -> str:
    mean = f"**{cell.mean}**" if cell.best else cell.mean
    return " ".join(part for part in (mean, cell.interval, cell.images, cell.against) if part)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(one)} |" for one in (head, ["---"] * len(head), *rows)]
