"""The page of feature cards: one file, readable without its script, which only searches and sorts."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from fga_fast.cards.card import Agreement, Card, Example, pairs_of
from fga_fast.cards.evidence import PANELS
from fga_fast.question.names import short
from fga_fast.result.features import card_url
from fga_fast.result.page import definitions, page

_FREQUENT = 1.25  # times as frequent a class must be to be named
_DRAWN = 2000  # dots at most

_STYLE = """
main > p { max-width: 62rem }
a { color: inherit; text-decoration-color: var(--dim); text-underline-offset: .15em }
:focus-visible { outline: 3px solid var(--strong); outline-offset: 2px; border-radius: .2rem }
.tools { display: none; gap: .6rem 1.2rem; flex-wrap: wrap; align-items: end; position: sticky; top: 0; z-index: 1;
  padding: .7rem 0; background: var(--paper); border-bottom: 1px solid var(--line) }
.script .tools { display: flex }
.tools label { display: grid; font-size: .8rem; color: var(--dim) }
.tools input, .tools select { font: inherit; font-size: 1rem; color: var(--ink); background: var(--soft);
  border: 1px solid var(--line); border-radius: .35rem; padding: .3rem .5rem }
.tools input { width: min(22rem, 70vw) } .tools output { color: var(--dim); font-size: .9rem; padding-bottom: .35rem }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(35rem, 100%), 1fr)); gap: 1.2rem;
  margin-top: 1.2rem }
.card { border: 1px solid var(--line); border-radius: .7rem; padding: 1rem 1.1rem; scroll-margin-top: 5.5rem;
  content-visibility: auto; contain-intrinsic-size: auto 62rem; min-width: 0 }
.card:target { border-color: var(--strong); box-shadow: 0 0 0 2px var(--strong) } .card[hidden] { display: none }
.card h3 { margin: 0; font-size: 1.05rem; display: flex; gap: .3rem .7rem; flex-wrap: wrap; align-items: baseline }
.card h3 a { text-decoration: none; color: var(--dim); font-weight: 500 }
.card h3 a:hover { text-decoration: underline }
.card .said { margin: .3rem 0 0; white-space: pre-line; overflow-wrap: anywhere } .name { overflow-wrap: anywhere }
.facts { display: grid; grid-template-columns: minmax(9rem, 1fr) 2fr; gap: .8rem 1.4rem; margin: .8rem 0;
  align-items: start; font-size: .88rem }
.facts svg { width: 100%; height: auto; display: block } .facts svg rect { fill: var(--strong); opacity: .75 }
.facts svg text { fill: var(--dim); font-size: 13px }
.facts dl { margin: 0; display: grid; grid-template-columns: auto 1fr; gap: .12rem .7rem }
.facts dt { margin: 0; font-weight: 400; color: var(--dim) } .facts dd { overflow-wrap: anywhere }
.for { color: var(--strong) } .against { color: var(--warm) } .for, .against { white-space: nowrap }
.examples { list-style: none; margin: 0; padding: 0; display: grid; gap: .55rem }
.examples img { display: block; width: 100%; height: auto; border-radius: .3rem;
  background: var(--soft) }
.examples p { margin: .1rem 0 0; font-size: .82rem; color: var(--dim); font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere }
.examples b { font-weight: 600; color: var(--ink) }
.legend { display: grid; grid-template-columns: repeat(4, 1fr); font-size: .75rem;
  line-height: 1.25; color: var(--dim); margin: 0 0 .3rem; gap: .3rem }
.agreement { display: grid; grid-template-columns: 13rem minmax(0, 44rem); gap: 1rem 2rem; align-items: center;
  margin: 1.2rem 0 }
.agreement svg { width: 100%; height: auto } .agreement circle { fill: var(--strong); opacity: .45 }
.agreement line { stroke: var(--line) } .agreement text { fill: var(--dim); font-size: 14px }
@media (max-width: 40rem) { .facts, .agreement { grid-template-columns: 1fr } body { padding: 1rem }
  .tools { position: static } .facts svg, .agreement svg { max-width: 14rem } }
@media print { .tools { display: none !important } .card { content-visibility: visible; break-inside: avoid } }
"""

_SCRIPT = """
(() => {
  const cards = [...document.querySelectorAll('.card')], list = document.querySelector('.cards');
  const [search, block, order, count] = ['search', 'block', 'order', 'count'].map(id => document.getElementById(id));
  document.documentElement.classList.add('script');
  const text = cards.map(card => card.dataset.words.toLowerCase());
  const show = () => {
    const words = search.value.toLowerCase().split(/\\s+/).filter(Boolean);
    let shown = 0;
    cards.forEach((card, i) => {
      const yes = (!block.value || card.dataset.block === block.value) && words.every(word => text[i].includes(word));
      card.hidden = !yes;
      shown += yes;
    });
    count.value = shown + ' of ' + cards.length + ' features';
  };
  const sort = () => {
    const key = order.value;
    const by = key === 'number' ? () => 0 : (a, b) => b.dataset[key] - a.dataset[key];
    list.append(...[...cards].sort(by));
  };
  search.addEventListener('input', show);
  block.addEventListener('change', show);
  order.addEventListener('change', sort);
  document.addEventListener('keydown', event => {
    if (event.key === '/' && !/input|select|textarea/i.test(event.target.tagName)) {
      event.preventDefault();
      search.focus();
    } else if (event.key === 'Escape' && event.target === search) {
      search.value = '';
      show();
    }
  });
  addEventListener('hashchange', () => {
    const card = document.getElementById(location.hash.slice(1));
    if (card && card.hidden) { search.value = block.value = ''; show(); card.scrollIntoView(); }
  });
  sort();
  show();
})();
"""


def cards_page(title: str, cards: Sequence[Card], agreement: Agreement | None, told: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        title: plain text.
        cards: in the order in which they stand.
        agreement: of contributions and measurements.
        told: "images" and "model_checksum" of the harvest.
    """
    blocks = sorted({card.block for card in cards})
    there = {(card.block, card.feature) for card in cards}
    named = ", ".join(map(str, blocks))
    intro = (
        f"{len(cards)} features of sparse autoencoders after block{'s' if len(blocks) > 1 else ''} {named}, from the "
        f"patches of {told['images']:,} images. Checksum of the model: {told['model_checksum'][:12]}."
    )
    parts = [
        f"<p>{escape(intro)}</p>",
        _agreement(cards, agreement),
        _tools(blocks),
        '<h2>Features</h2><div class="cards">',
        *(_card(card, there) for card in cards),
        f"</div><h2>How to read this</h2>{_reading()}<script>{_SCRIPT}</script>",
    ]
    return page(title, "".join(parts), _STYLE)


def _tools(blocks: Sequence[int]) -> str:
    options = "".join(f'<option value="{block}">block {block}</option>' for block in blocks)
    orders = {
        "number": "block and number", "density": "how often active", "effect": "effect on the logit",
        "largest": "largest code",
    }  # fmt: skip
    by = "".join(f'<option value="{key}">{escape(text)}</option>' for key, text in orders.items())
    return (
        '<search class="tools"><label for="search">Search names, notes, classes, numbers ( / )'
        '<input id="search" type="search" autocomplete="off"></label>'
        f'<label for="block">Block<select id="block"><option value="">all</option>{options}</select></label>'
        f'<label for="order">Order<select id="order">{by}</select></label>'
        '<output id="count" for="search block" aria-live="polite"></output></search>'
    )


def _card(card: Card, there: set[tuple[int, int]]) -> str:
    anchor = card_url("", card.block, card.feature)
    effect = max((abs(one.measured) for one in card.examples if one.measured is not None), default=0.0)
    classes = [(one.number, one.name) for one in card.classes] + [(one.number, one.name) for one in card.pushes]
    words = " ".join(
        [
            str(card.feature),
            card.name,
            card.note,
            *(f"class {number} {known}" for number, known in dict.fromkeys(classes)),
        ]
    )
    name = f'<span class="name">{escape(card.name)}</span>' if card.name else ""
    note = f'<p class="said">{escape(card.note)}</p>' if card.note else ""
    shown = "".join(_example(card, one) for one in card.examples)
    legend = "".join(f"<span>{escape(panel)}</span>" for panel in PANELS)
    return (
        f'<article class="card" id="{anchor[1:]}" data-block="{card.block}" data-density="{card.density:.6g}" '
        f'data-largest="{card.largest:.6g}" data-effect="{effect:.6g}" data-words="{escape(words)}">'
        f'<h3><a href="{anchor}">block {card.block} · feature {card.feature}</a>{name}</h3>{note}'
        f'<div class="facts"><div>{_histogram(card)}</div>{_facts(card, there)}</div>'
        f'<div class="legend" aria-hidden="true">{legend}</div><ol class="examples">{shown}</ol></article>\n'
    )


def _facts(card: Card, there: set[tuple[int, int]]) -> str:
    company = []
    for one in card.company:
        text = f"{one.feature}{f' {one.name}' if one.name else ''}"
        place, known = card_url("", card.block, one.feature), (card.block, one.feature) in there
        company.append((f'<a href="{place}">{escape(text)}</a>' if known else escape(text)) + f" ({one.jaccard:.0%})")
    pushes = [
        f'<span class="{"for" if one.value > 0 else "against"}">{escape(short(one.name))} {_signed(one.value)}</span>'
        for one in card.pushes
        if abs(one.value) >= 0.005
    ]
    rows = {
        "active in": f"{_percent(card.density)} of patches, {_percent(card.images)} of images",
        "code": f"mean {_number(card.mean)}, largest {_number(card.largest)}",
        "images seen as": ", ".join(
            f"{escape(short(one.name))} {one.share:.0%} ({one.usual:.0%})"
            for one in card.classes
            if one.share >= _FREQUENT * one.usual
        ),
        "pushes": ", ".join(pushes),
        "together with": ", ".join(company),
    }
    return f"<dl>{''.join(f'<dt>{key}</dt><dd>{value}</dd>' for key, value in rows.items() if value)}</dl>"


def _example(card: Card, one: Example) -> str:
    row, column = one.patch
    url = f"data:image/jpeg;base64,{base64.b64encode(one.picture).decode('ascii')}"
    alt = f"{one.key}: feature {card.feature} is strongest at row {row + 1}, column {column + 1}"
    width, height = Image.open(io.BytesIO(one.picture)).size
    effect = ""
    if one.target is not None and one.measured is not None:
        predicted = "" if one.predicted is None else f" (predicted {_signed(one.predicted)})"
        effect = f" · adds {_coloured(one.measured)} to <b>{escape(short(one.target))}</b>{predicted}"
    trouble = f'<br><span class="against">{escape(one.error)}</span>' if one.error else ""
    return (
        f'<li><img loading="lazy" decoding="async" width="{width}" height="{height}" src="{url}" alt="{escape(alt)}">'
        f"<p>{escape(one.key)} · code <b>{_number(one.code)}</b>{effect}{trouble}</p></li>"
    )


def _histogram(card: Card) -> str:
    """Bars of patches by strength, as wide as the card's own range, counts on a root scale."""
    if not card.histogram:
        return "<p>never active</p>"
    width, height, count = 220, 64, len(card.histogram)
    most = max(patches for _, _, patches in card.histogram)
    each = width / max(count, 8)
    bars = "".join(
        f'<rect x="{place * each:.1f}" width="{max(each - 1, 0.5):.1f}" y="{height - bar:.1f}" height="{bar:.1f}"/>'
        for place, (_, _, patches) in enumerate(card.histogram)
        if (bar := height * math.sqrt(patches / most))
    )
    low, high = card.histogram[0][0], card.histogram[-1][1]
    heard = f"Patches by strength of the code, from {_number(low)} to {_number(high)}; {most} in the tallest bar"
    return (
        f'<svg role="img" viewBox="0 0 {width} {height + 14}"><title>{escape(heard)}</title>{bars}'
        f'<text x="0" y="{height + 11}">{_number(low)}</text>'
        f'<text x="{min(count * each, width):.1f}" y="{height + 11}" text-anchor="end">{_number(high)}</text></svg>'
    )


def _agreement(cards: Sequence[Card], agreement: Agreement | None) -> str:
    """Predicted against measured, all examples."""
    if agreement is None:
        return ""
    pairs = pairs_of(cards)
    shown = pairs[:: -(-len(pairs) // _DRAWN)]
    reach = max(max(abs(a), abs(b)) for a, b in pairs) or 1.0
    size = 240

    def at(value: float) -> float:
        return (value / reach + 1.05) / 2.1 * size

    dots = "".join(f'<circle cx="{at(a):.1f}" cy="{size - at(b):.1f}" r="2.2"/>' for a, b in shown)
    lines = (
        f'<line x1="0" x2="{size}" y1="{size / 2}" y2="{size / 2}"/><line x1="{size / 2}" x2="{size / 2}" y1="0" '
        f'y2="{size}"/><line x1="0" x2="{size}" y1="{size}" y2="0" stroke-dasharray="4 4"/>'
    )
    text = (
        f"Does the prediction hold? In {agreement.pairs} pairs of a feature and one of its images, the feature's "
        f"contribution to the logit of the predicted class by the gradient, and what this logit loses when the feature "
        f"is switched off, have a Pearson correlation of {agreement.pearson:.2f} and a Spearman rank correlation of "
        f"{agreement.spearman:.2f}. On the dashed line both are equal; its ends are at ±{_number(reach)}."
    )
    if len(shown) < len(pairs):
        text += f" {len(shown):,} of the pairs are drawn."
    return (
        f'<section class="agreement"><svg role="img" viewBox="0 0 {size} {size}"><title>Predicted and measured effect'
        f"</title>{lines}{dots}<text x='{size - 4}' y='{size / 2 - 5}' text-anchor='end'>predicted →</text>"
        f"<text x='{size / 2 + 6}' y='12'>measured ↑</text></svg><p>{escape(text)}</p></section>"
    )


def _reading() -> str:
    entries = {
        "Four panels": "The image as the model sees it, its strongest patch framed. Amber where the feature is active. "
        "The strongest patch with its neighbours. Amber where pixels drive the code at that patch: the magnitude of "
        "the gradient, summed over channels, smoothed over 3 x 3 pixels.",
        "Bars": "Patches by the strength of the code; four bars double it. Heights are square roots of counts, so that "
        "rare strong codes can be seen.",
        "images seen as": "Predicted classes that are more frequent among the images in which the feature is active "
        f"than among all images (share in brackets), at least {_FREQUENT:g} times.",
        "adds, pushes": "What the logit of a class loses when the feature is switched off at all patches: in one "
        "image, and in the mean over the images shown. Above 0 the feature speaks for the class.",
        "together with": "Features that are active in the same patches: patches with both, as a share of those with "
        "one of them (Jaccard index).",
        "predicted": "By the gradient of the logit: how much of it the feature's part of the stream accounts for. "
        "Measured is what happens; where the two differ, the model is not linear there.",
    }
    return definitions(entries)


def _coloured(value: float) -> str:
    return f'<span class="{"for" if value >= 0 else "against"}">{_signed(value)}</span>'


def _signed(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return "0.00" if abs(value) < 0.005 else f"{value:+.2f}".replace("-", "−")


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}" if share >= 0.001 else f"{share:.2g}"


def _number(value: float) -> str:
    return f"{value:.3g}"
