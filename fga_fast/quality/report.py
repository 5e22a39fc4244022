"""Writes how good SAEs are: numbers as JSON, an HTML page of one file, and Markdown for a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from fga_fast.io.atomic import atomic_write, check_writable_folder
from fga_fast.quality.page import report_page
from fga_fast.quality.run import Quality
from fga_fast.quality.words import (
    count,
    effects,
    meanings,
    sae_line,
    summary,
    value_of,
    warnings,
    warnings_of_images,
)


class Written(NamedTuple):
    """Where the reports are."""

    json: Path
    html: Path
    markdown: Path


def write(out: str | Path, saes: Mapping[str, Quality], facts: Mapping[str, str] | None = None) -> Written:
    """Writes sae_report.json, sae_report.html and sae_report.md.

    Args:
        out: folder, made if it is missing.
        saes: name -> what `quality.run.compare` measured. Names are shown as they are.
        facts: name -> value, what the run was made with, such as the model and the command.

    Raises:
        ValueError: no SAE.
        OSError: the folder cannot be written.
    """
    if not saes:
        raise ValueError("saes: expected at least one, got none")
    folder, facts = check_writable_folder(out), dict(facts or {})
    images = warnings_of_images(next(iter(saes.values())))
    found = {
        name: asdict(one) | {"recovered": one.behaviour.recovered, "warnings": warnings(one)}
        for name, one in saes.items()
    }
    text = json.dumps({"facts": facts, "warnings": images, "saes": found}, indent=2, allow_nan=False) + "\n"
    return Written(
        _written(folder / "sae_report.json", text),
        _written(folder / "sae_report.html", report_page(saes, facts)),
        _written(folder / "sae_report.md", markdown(saes, facts)),
    )


def _written(path: Path, text: str) -> Path:
    # Names of files may hold bytes that are no UTF-8.
    return atomic_write(path, text.encode("utf-8", "replace"))


def markdown(saes: Mapping[str, Quality], facts: Mapping[str, str]) -> str:
    """The report as text with tables."""
    rows = {name: summary(one) for name, one in saes.items()}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    first = next(iter(saes.values()))
    lines = [
        "# Quality of sparse autoencoders",
        "",
        f"{count(first.images, 'image')}, {count(first.tokens, 'patch')}.",
        "",
    ]
    lines += [*(f"- {text}" for text in warnings_of_images(first)), ""]
    lines += _table(["SAE", *columns], [[name, *(row.get(one, "–") for one in columns)] for name, row in rows.items()])
    for name, one in saes.items():
        lines += ["", f"## {_line(name)}", "", sae_line(one), ""]
        lines += _table(["", "plain model", "reconstruction", "mean", "recovered"], [
            [what, *(value_of(what, value) for value in (effect.plain, effect.spliced, effect.mean)), recovered or "–"]
            for what, (effect, recovered) in effects(one.behaviour).items()
        ])  # fmt: skip
        found = warnings(one)
        lines += ["", *(f"- {_line(text)}" for text in found)] if found else []
    if first.errors:
        lines += ["", "## Images that were left out", ""]
        lines += [f"- {_line(key)}: {_line(reason)}" for key, reason in first.errors]
    lines += ["", "## What the numbers mean", "", *(f"- **{name}**: {text}" for name, text in meanings(saes).items())]
    lines += ["", "## How this was made", "", *(f"- {_line(name)}: {_line(text)}" for name, text in facts.items())]
    return "\n".join(lines) + "\n"


def _line(text: str) -> str:
    """Text on one line that Markdown takes as it is."""
    found = " ".join(text.split())
    for sign in "\\`*_<>[]|#":
        found = found.replace(sign, f"\\{sign}")
    return found


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(map(_cell, one))} |" for one in (head, ["---"] * len(head), *rows)]


def _cell(text: str) -> str:
    return text if text == "---" else _line(text)
