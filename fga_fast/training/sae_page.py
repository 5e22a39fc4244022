"""The page that shows how good SAEs are: one file without scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from fga_fast.result.page import page
from fga_fast.training import sae_plots
from fga_fast.training.behaviour import Behaviour
from fga_fast.training.cosines import Stability
from fga_fast.training.quality import Quality
from fga_fast.training.sae_plots import Axis
from fga_fast.training.sae_words import effects, meanings, number, sae_line, share, summary, value_of, warnings

_STYLE = (
    sae_plots.STYLE
    + """
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: 1.6rem 2rem }
.plots h3 { font-size: 1rem; margin: 0 0 .3rem } .plots p { margin: .3rem 0; font-size: .9rem; color: var(--dim) }
section { border-top: 1px solid var(--line); margin-top: 2.4rem } section > h2 { margin-top: 1rem }
.look { border-left: 4px solid var(--warm); background: var(--soft); padding: .1rem 1rem; margin: 1rem 0 }
.look h3 { color: var(--warm); font-size: 1rem; margin: .6rem 0 0 } .fine { color: var(--strong) }
summary { cursor: pointer; color: var(--dim); font-size: .9rem }
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
        f"{len(saes)} sparse autoencoder(s), measured on {first.images:,} image(s) with {first.tokens:,} patches that "
        "should not be among those it was trained on."
    )
    parts = [f"<p>{escape(said)}</p>", _table(saes), _plots_of_blocks(saes)]
    parts += [_section(name, one, number) for number, (name, one) in enumerate(saes.items(), start=1)]
    parts += [_errors(first.errors), "<section><h2>What the numbers mean</h2>", _list(meanings(saes)), "</section>"]
    parts += ["<section><h2>How this was made</h2>", _list(facts), "</section>"]
    return page("Quality of sparse autoencoders", "".join(parts), _STYLE)


def _table(saes: Mapping[str, Quality]) -> str:
    rows = {name: summary(one) for name, one in saes.items()}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    body = [[name, *(row.get(column, "–") for column in columns)] for name, row in rows.items()]
    if len(body) > 1:
        body = [[f"{place}. {first}", *rest] for place, (first, *rest) in enumerate(body, start=1)]
    return _html_table(["SAE", *columns], body)


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    heads = "".join(f'<th scope="col"{_right(place)}>{escape(name)}</th>' for place, name in enumerate(head))
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f'<td class="number">{escape(cell)}</td>' for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _right(place: int) -> str:
    return ' class="number"' if place else ""


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
            drawn.append(_figure(title, sae_plots.scatter(points, title), "Numbers are those of the table."))
    return f'<div class="plots">{"".join(drawn)}</div>' if drawn else ""


def _section(name: str, one: Quality, place: int) -> str:
    found = warnings(one)
    looks = "".join(f"<li>{escape(text)}</li>" for text in found)
    look = (
        f'<div class="look"><h3>What to look at</h3><ul>{looks}</ul></div>'
        if found
        else '<p class="fine">Nothing here is suspicious.</p>'
    )
    return (
        f'<section aria-labelledby="sae-{place}"><h2 id="sae-{place}">{escape(name)}</h2><p>{escape(sae_line(one))}</p>'
        f'{look}<h3>What the model does with it</h3>{_effects(one.behaviour)}<div class="plots">{_plots(one)}</div>'
        "</section>"
    )


def _effects(found: Behaviour) -> str:
    rows = [
        [what, *(value_of(what, value) for value in (effect.plain, effect.spliced, effect.mean)), recovered or "–"]
        for what, (effect, recovered) in effects(found).items()
    ]
    known = f"<p>Loss and accuracy: of {found.known:,} image(s) whose class is known.</p>" if found.known else ""
    return _html_table(["", "plain model", "with the reconstruction", "with the mean", "recovered"], rows) + known


def _plots(one: Quality) -> str:
    low, middle, high = one.l0_percentiles
    of_l0 = f"Mean {number(one.l0)}. Half of the patches have at most {middle}, 5 % at most {low}, 95 % at most {high}."
    alive = sum(one.density.counts)
    of_density = f"{alive:,} of {one.features:,} features were active at least once; {share(one.dead)} are dead."
    grid = one.unexplained
    return "".join([
        _figure("Active features of a patch", sae_plots.bars(one.l0_histogram, Axis("L0", "patches", True)), of_l0),
        _figure(
            "How often features are active",
            sae_plots.bars(one.density, Axis("density", "features", reads=", log10 of the share of patches")),
            of_density,
        ),
        _figure(
            "How alike features are",
            sae_plots.bars(one.cosines, Axis("cosine", "features", reads=" to the most similar decoder row")),
            f"{share(one.copies)} are near-copies of another one (above 0.9).",
        ),
        _figure("Where the error is", sae_plots.positions(grid), "Share of the variance that is not explained."),
        "" if one.stability is None else _stability(one.stability),
    ])  # fmt: skip


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
    drawn = sae_plots.bars(found.forth.cosines, axis, found.chance.cosines)
    table = _html_table(["", "cosine above 0.9", "mean largest cosine"], rows)
    return _figure("What a second SAE shares", drawn + legend + table, "")


def _figure(title: str, drawn: str, note: str) -> str:
    return f"<div><h3>{escape(title)}</h3>{drawn}{f'<p>{escape(note)}</p>' if note else ''}</div>"


def _errors(errors: Sequence[tuple[str, str]]) -> str:
    if not errors:
        return ""
    listed = "".join(f"<li><strong>{escape(key)}</strong>: {escape(reason)}</li>" for key, reason in errors)
    return f"<section><h2>Images that were left out</h2><ul>{listed}</ul></section>"


def _list(entries: Mapping[str, str]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in entries.items())}</dl>"
