"""The page that shows how good SAEs are: one file without scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import starmap

from fga_fast.quality import plots
from fga_fast.quality.behaviour import Behaviour
from fga_fast.quality.cosines import Stability
from fga_fast.quality.plots import Axis, table
from fga_fast.quality.run import Quality
from fga_fast.quality.words import (
    count,
    effects,
    is_constant,
    meanings,
    number,
    sae_line,
    share,
    summary,
    value_of,
    warnings,
    warnings_of_images,
)
from fga_fast.result.page import definitions, page

_WITH, _SHARED = "What the model does with it", "What a second SAE shares"
_STYLE = (
    plots.STYLE
    + """
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: 1.6rem 2rem;
  margin-top: 1.6rem }
.plots h3 { font-size: 1rem; margin: 0 0 .3rem } .plots p { margin: .3rem 0; font-size: .9rem; color: var(--dim) }
section { border-top: 1px solid var(--line); margin-top: 2.4rem } section > h2 { margin-top: 1rem }
.look { border-left: 4px solid var(--warm); background: var(--soft); padding: .1rem 1rem; margin: 1rem 0 }
.look h2, .look h3 { color: var(--warm); font-size: 1rem; margin: .6rem 0 0 } .fine { color: var(--strong) }
a { color: inherit } details { margin-bottom: .5rem } summary { cursor: pointer; color: var(--dim); font-size: .9rem }
td { white-space: nowrap } td.number, th.number { text-align: right }
th[scope=row] { font-weight: 600; overflow-wrap: anywhere; min-width: 8rem }
@media print { details { display: none } section { break-inside: avoid } }
"""
)


def report_page(saes: Mapping[str, Quality], facts: Mapping[str, str]) -> str:
    """The whole page.

    Args:
        saes: name -> what was measured.
        facts: name -> value, what the run was made with.
    """
    first = next(iter(saes.values()))
    said = (
        f"{count(len(saes), 'sparse autoencoder')}, measured on {count(first.images, 'image')} with "
        f"{count(first.tokens, 'patch')}. The numbers are fair if no SAE was trained on these images."
    )
    parts = [f"<p>{escape(said)}</p>", _look(warnings_of_images(first)), _table(saes), _plots_of_blocks(saes)]
    parts += [_section(name, one, place) for place, (name, one) in enumerate(saes.items(), start=1)]
    parts += [
        _errors(first.errors),
        "<section><h2>What the numbers mean</h2>",
        definitions(meanings(saes)),
        "</section>",
    ]
    parts += ["<section><h2>How this was made</h2>", definitions(facts), "</section>"]
    return page("Quality of sparse autoencoders", "".join(parts), _STYLE)


def _look(warnings: Sequence[str], title: str = "What to look at", level: int = 2) -> str:
    """A box with warnings, if there are any."""
    listed = "".join(f"<li>{escape(text)}</li>" for text in warnings)
    return f'<div class="look"><h{level}>{title}</h{level}><ul>{listed}</ul></div>' if warnings else ""


def _table(saes: Mapping[str, Quality]) -> str:
    rows = {name: summary(one) for name, one in saes.items()}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    body = [[name, *(row.get(column, "–") for column in columns)] for name, row in rows.items()]
    return table(["SAE", *columns], body, "All autoencoders", linked=True)


def _plots_of_blocks(saes: Mapping[str, Quality]) -> str:
    """For each block with several SAEs, their explained variance against L0."""
    drawn = []
    for block in dict.fromkeys(one.block for one in saes.values()):
        points = [
            (str(place), one.l0, one.explained_variance)
            for place, one in enumerate(saes.values(), start=1)
            if one.block == block
        ]
        if len(points) > 1:
            title = f"Explained variance against L0, block {block}"
            drawn.append(
                _figure(
                    title,
                    "The numbers are those of the table. Best is the upper left.",
                    plots.scatter(points, title),
                )
            )
    return f'<div class="plots">{"".join(drawn)}</div>' if drawn else ""


def _section(name: str, one: Quality, place: int) -> str:
    look = _look(warnings(one), level=3) or '<p class="fine">Nothing here is suspicious.</p>'
    return (
        f'<section aria-labelledby="sae-{place}"><h2 id="sae-{place}">{place}. {escape(name)}</h2>'
        f"<p>{escape(sae_line(one))}</p>{look}<h3>{_WITH}</h3>{_effects(one.behaviour)}"
        f'<div class="plots">{_plots(one)}</div></section>'
    )


def _effects(found: Behaviour) -> str:
    rows = [
        [what, *(value_of(what, value) for value in (effect.plain, effect.spliced, effect.mean)), recovered or "–"]
        for what, (effect, recovered) in effects(found).items()
    ]
    known = f"<p>Loss and accuracy: of {count(found.known, 'image')} with a known class.</p>" if found.known else ""
    return table(["", "plain model", "with the reconstruction", "with the mean", "recovered"], rows, _WITH) + known


def _plots(one: Quality) -> str:
    low, middle, high = one.l0_percentiles
    of_l0 = f"Mean {number(one.l0)}. Half of the patches have at most {middle}, 5 % at most {low}, 95 % at most {high}."
    known = [value for row in one.unexplained for value in row if value is not None]
    figures = [
        ("Active features of a patch", of_l0, plots.bars(one.l0_histogram, Axis("L0", "patches", True))),
        (
            "How often features are active",
            f"{sum(one.density.counts):,} of {one.features:,} features were active at least once, {share(one.dead)} "
            "never (dead).",
            plots.bars(one.density, Axis("density", "features", reads=", log10 of the share of patches")),
        ),
        (
            "How alike features are",
            f"{share(one.copies)} are near-copies of another one (cosine above 0.9).",
            plots.bars(one.cosines, Axis("cosine", "features", reads=" to the most similar decoder row")),
        ),
        (
            "Where in the image the error is",
            f"Share of the variance that is not explained, from {share(min(known))} (faint) to {share(max(known))} "
            "(full colour).",
            plots.positions(one.unexplained),
        ),
    ]
    if is_constant(one):  # `sae_line` says it
        figures = figures[1:]
    return "".join(starmap(_figure, figures)) + ("" if one.stability is None else _stability(one.stability))


def _stability(found: Stability) -> str:
    rows = [
        [name, share(one.matched), number(one.mean)]
        for name, one in (
            ("features with a partner in the second SAE", found.forth),
            ("the second SAE's features, with one in this", found.back),
            ("by chance: partners among random rows", found.chance),
            ("by chance: random rows, with one in this", found.chance_back),
        )
    ]
    legend = (
        '<p><span class="key bar" aria-hidden="true"></span>second SAE (bars) '
        '<span class="key chance" aria-hidden="true"></span>random rows (dashed line)</p>'
    )
    axis = Axis("cosine", "features", reads=" to the most similar row of the second SAE")
    drawn = plots.bars(found.forth.cosines, axis, found.chance.cosines)
    numbers = table(["", "cosine above 0.9", "mean largest cosine"], rows, _SHARED)
    note = f"{share(found.forth.matched)} of the features have a partner with a cosine above 0.9 in it."
    return _figure(_SHARED, note, legend + drawn + numbers)


def _figure(title: str, note: str, drawn: str) -> str:
    return f"<div><h3>{escape(title)}</h3><p>{escape(note)}</p>{drawn}</div>"


def _errors(errors: Sequence[tuple[str, str]]) -> str:
    if not errors:
        return ""
    listed = "".join(f"<li><strong>{escape(key)}</strong>: {escape(reason)}</li>" for key, reason in errors)
    return f"<section><h2>Images that were left out</h2><ul>{listed}</ul></section>"
