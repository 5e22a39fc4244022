"""The HTML report: one file without scripts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fga_fast.evaluation import wording
from fga_fast.evaluation.examples import Example
from fga_fast.evaluation.plots import Dot, dots
from fga_fast.evaluation.wording import COLUMNS, Facts
from fga_fast.result.page import definitions, page, png_url, wide

_STYLE = """
td small { display: block; color: var(--dim); white-space: nowrap }
.best { font-weight: 700; color: var(--strong) } .worse { color: var(--warm) } .better { color: var(--strong) }
.tag { font-size: .75rem; color: var(--dim); border: 1px solid var(--line); border-radius: .6rem; padding: 0 .4rem }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(28rem, 100%), 1fr)); gap: 1rem 2rem }
.plot { width: 100%; height: auto } .plot text { fill: var(--ink); font-size: 12px }
.plot .label { text-anchor: end } .plot .tick { text-anchor: middle; fill: var(--dim) }
.plot line { stroke: var(--ink); stroke-width: 2 } .plot .grid { stroke: var(--line); stroke-width: 1 }
.plot .zero { stroke: var(--dim); stroke-width: 1; stroke-dasharray: 4 3 }
.plot circle { fill: var(--ink) } .plot .strong circle { fill: var(--strong) }
.plot .strong line { stroke: var(--strong) } .plot .strong text { fill: var(--strong); font-weight: 700 }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(34rem, 100%), 1fr)); gap: 1.2rem }
.three { display: grid; grid-template-columns: repeat(3, 1fr); gap: .4rem; font-size: .85rem; color: var(--dim) }
.three img { width: 100%; display: block }
"""


def report_page(facts: Facts, examples: Sequence[Example] = ()) -> str:
    """The whole page."""
    settings = facts.settings
    split = {"both": "both halves"}.get(settings["split"], f"the half '{settings['split']}'")
    summary = (
        f"{len(wording.methods_of(facts))} methods, {len(wording.metrics_of(facts))} metrics, {settings['images']} "
        f"images of {split}, model {settings['model']}."
    )
    parts = [
        f"<p>{escape(summary)}</p>",
        "<h2>Means</h2>", _means(facts), "<h2>Plots</h2>", _plots(facts), "<h2>Comparisons</h2>", _comparisons(facts),
        _examples(examples), "<h2>How to read this</h2>", definitions(wording.sentences(facts)), "<h2>Settings</h2>",
        definitions({name: str(value) for name, value in settings.items()}),
        f"<h2>Command</h2><pre>{escape(facts.command)}</pre>" if facts.command else "",
    ]  # fmt: skip
    return page("Evaluation", "".join(parts), _STYLE)


def _means(facts: Facts) -> str:
    metrics, found = wording.metrics_of(facts), wording.cells(facts)
    higher = {one.metric: one.higher for one in facts.analysis.summaries}
    head = "".join(f'<th scope="col">{escape(wording.heading(name, higher[name]))}</th>' for name in metrics)
    rows = []
    for method in wording.methods_of(facts):
        tag = ' <span class="tag">control</span>' if method in facts.controls else ""
        row = "".join(_cell(found[method, metric]) for metric in metrics)
        rows.append(f'<tr><th scope="row">{escape(method)}{tag}</th>{row}</tr>')
    note = (
        "★ is the best mean of a column; ↑ more is better, ↓ less is better. In brackets the 95 % interval of the mean."
    )
    note += f" {wording.means_note(facts)}"
    if facts.analysis.baselines:
        note += f" p is against {facts.analysis.baselines[0]}: Wilcoxon's test, corrected by Holm over the whole table."
    table = f'<table><thead><tr><th scope="col">method</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f"{wide(table, 'Means')}<p>{escape(note)}</p>"


def _cell(cell: wording.Cell) -> str:
    mean = f'<span class="best">★ {cell.mean}</span>' if cell.best else cell.mean
    below = "".join(f"<small>{escape(part)}</small>" for part in (cell.interval, cell.images, cell.against) if part)
    return f"<td>{mean}{below}</td>"


def _plots(facts: Facts) -> str:
    best = wording.best_of(facts.analysis.summaries)
    made = []
    for metric in wording.metrics_of(facts):
        of_metric = [one for one in facts.analysis.summaries if one.metric == metric]
        rows = [Dot(one.method, one.mean, *one.interval, one.method in best[metric]) for one in of_metric]
        count = wording.counted([one.images for one in of_metric])
        title = f"{wording.heading(metric, of_metric[0].higher)}, mean and 95 % interval, {count}"
        made.append(f"<figure><figcaption>{escape(title)}</figcaption>{dots(rows, title)}</figure>")
        for baseline in facts.analysis.baselines:
            compared = [c for c in facts.analysis.comparisons if c.metric == metric and c.baseline == baseline]
            if compared:
                rows = [Dot(one.method, one.gain, *one.interval, one.verdict == "better") for one in compared]
                count = wording.counted([one.images for one in compared])
                title = f"{metric}, gain over {baseline} (right of 0 is better) and 95 % interval, {count}"
                made.append(f"<figure><figcaption>{escape(title)}</figcaption>{dots(rows, title, zero=True)}</figure>")
    return f'<div class="plots">{"".join(made)}</div>'


def _comparisons(facts: Facts) -> str:
    if not facts.analysis.comparisons:
        return "<p>None: no baseline was run beside another method.</p>"
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in COLUMNS)
    rows = "".join(
        f"<tr>{''.join(f'<td{_kind(word)}>{escape(word)}</td>' for word in wording.row(one))}</tr>"
        for one in facts.analysis.comparisons
    )
    return wide(f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>", "Comparisons")


def _kind(word: str) -> str:
    return f' class="{word}"' if word in ("better", "worse") else ""


def _examples(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    first = examples[0]
    method, baseline = first.methods
    parts = [f"<h2>Images with the largest and the smallest gain of {escape(method)} over {escape(baseline)}</h2>"]
    parts.append(
        f"<p>By {escape(first.metric)}. Such images are extremes: they show how maps differ, not how often.</p>"
    )
    for best, title in ((True, "Largest gain"), (False, "Smallest gain")):
        shown = [one for one in examples if one.best == best]
        if shown:
            parts.append(f'<h3>{title}</h3><div class="examples">{"".join(map(_example, shown))}</div>')
    return "".join(parts)


def _example(one: Example) -> str:
    names = ("image", *one.methods)
    pictures = "".join(
        f'<span><img alt="{escape(f"{name}, {one.name}")}" src="{png_url(picture)}">{escape(name)}</span>'
        for name, picture in zip(names, one.pictures, strict=True)
    )
    about = f"{one.name}: {one.about}, gain {wording.number(one.gain)}"
    return f'<figure><div class="three">{pictures}</div><figcaption>{escape(about)}</figcaption></figure>'
