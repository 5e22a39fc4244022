"""HTML pages: one file, light or dark as the reader's system, readable in print, without a request to anywhere."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --paper: #ffffff; --soft: #f2f4f6; --line: #c9d0d6; --dim: #56616b;
  --strong: #0a6d4f; --warm: #9a4a00 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaee; --paper: #14181c; --soft: #1f262c; --line: #3b454e;
  --dim: #a3afba; --strong: #5fd3a8; --warm: #f0a860 } }
body { margin: 0 auto; padding: 1.5rem; max-width: 76rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
thead th { background: var(--soft) }
figure { margin: 0 } figcaption { color: var(--dim); font-size: .9rem }
dt { font-weight: 600; margin-top: .7rem } dd { margin: 0; max-width: 62rem }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; white-space: pre-wrap; word-break: break-word }
@media print { body { max-width: none } }
"""


def page(title: str, body: str, style: str = "") -> str:
    """A whole page.

    Args:
        title: plain text, the page's title and first heading.
        body: HTML that follows the heading.
        style: CSS of this page beside the common one, which has the colours --ink, --paper, --soft, --line, --dim,
            --strong and --warm.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{_STYLE}{style}</style></head><body><main><h1>{escape(title)}</h1>{body}</main></body></html>\n"
    )


def wide(table: str, label: str) -> str:
    """HTML of a table that scrolls sideways where it must, also by keys.

    Args:
        table: HTML.
        label: what it shows, in plain text, for readers who hear the page.
    """
    return f'<div class="wide" tabindex="0" role="region" aria-label="{escape(label)}">{table}</div>'


def definitions(entries: Mapping[str, str]) -> str:
    """A list of terms and what they mean, both plain text."""
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in entries.items())}</dl>"


def png_url(data: bytes) -> str:
    """The address of a picture that lies in the page itself; `data` is a PNG file."""
    return f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"
