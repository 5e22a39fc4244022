"""Writes the generated parts of docs/models.md: the tables of supported families and of refused classes.

    python scripts/models_table.py            # writes docs/models.md
    python scripts/models_table.py --check    # fails if the page is out of date

Builds a small model of each family of tests/families.py with random weights and explains it with the native backend and
the reference. Needs timm, transformers, open_clip, torchvision and the compiled library.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import families  # noqa: E402 - needs the path above
import torch  # noqa: E402
from families import Family  # noqa: E402

from fga_fast.models.refused import REFUSED, REFUSED_PARTS  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
BOUND = 1e-4  # as in tests/models/test_families.py; smaller errors differ between machines
ATTENTION = {"fused": "SDPA", "eager": "softmax", "MultiheadAttention": "MHA"}
PACKAGES = {"timm": "timm", "transformers": "Hugging Face", "open_clip": "open_clip", "torchvision": "torchvision"}


def measure(family: Family) -> float:
    """Largest relative error of relevance, native against reference, in float32, without SAEs and with two."""
    model = family.build()
    layout = families.layout_of(family, model)
    start, worst = families.seed(layout), 0.0
    for saes in ({}, families.autoencoders(layout)):
        got, want = (
            families.explain(family, model, name, saes=saes, preset="published") for name in ("native", "reference")
        )
        worst = max(worst, families.error(got.relevance - start, want.relevance - start))
    return worst


def pooling(family: Family) -> str:
    """How the logits read the tokens, in words."""
    tokens = family.prefix + family.grid[0] * family.grid[1]
    ranges = {(0, 1): "", (0, 2): "two tokens", (0, tokens): "all tokens", (family.prefix, tokens): "patches"}
    what = ranges[family.pooled]
    return {"token": "class token", "average": f"{what} averaged", "attention": f"attention over {what}"}[
        family.pooling
    ]


def supported(families_: Iterable[Family]) -> str:
    """The table of supported families; all attention implementations of a family share a row."""
    rows: dict[tuple[str, ...], list[Family]] = {}
    for family in families_:
        key = (family.library, family.name, family.model, pooling(family), str(family.prefix))
        rows.setdefault(key, []).append(family)
    notes: list[str] = []
    lines = [
        "| library | family | for example | attention | pooling | prefix tokens | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for (library, name, model, pool, prefix), members in rows.items():
        note = members[0].note
        if note and note not in notes:
            notes.append(note)
        mark = f" [{notes.index(note) + 1}]" if note else ""
        calls = ", ".join(dict.fromkeys(ATTENTION[member.attention] for member in members))
        worst = max(measure(member) for member in members)
        error = "< 1e-4" if worst < BOUND else f"**{worst:.0e}**"
        shown = ", ".join(part if part == "..." else f"`{part}`" for part in model.split(", "))
        lines.append(f"| {library} | {name} | {shown} | {calls} | {pool}{mark} | {prefix} | {error} |")
    lines += ["", *(f"- [{index}] {note[0].upper()}{note[1:]}." for index, note in enumerate(notes, 1))]
    return "\n".join(lines)


def refused() -> str:
    """The table of refused classes; those with the same reason share a row."""
    rows: dict[tuple[str, str], list[str]] = {}
    for package, classes in REFUSED.items():
        for name, reason in classes.items():
            rows.setdefault((PACKAGES[package], reason), []).append(f"`{name}`")
    for name, reason in REFUSED_PARTS.items():
        rows.setdefault(("timm, parts of a tower", reason), []).append(f"`{name}`")
    lines = ["| library | classes | why |", "|---|---|---|"]
    lines += [f"| {library} | {', '.join(names)} | {reason} |" for (library, reason), names in rows.items()]
    return "\n".join(lines)


def render(text: str) -> str:
    """The page with new generated parts; each is between a begin and an end comment."""
    for name, part in (("supported", supported(families.registry())), ("refused", refused())):
        pattern = re.compile(rf"(<!-- begin {name}[^\n]*-->\n).*?(<!-- end {name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, part=part: f"{match[1]}\n{part}\n\n{match[2]}", text)  # type: ignore[misc]
        if count != 1:
            raise SystemExit(f"{PAGE}: expected one part '{name}', found {count}")
    return text


def main() -> None:
    """Writes or checks the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the page is out of date")
    options = parser.parse_args()
    logging.getLogger("fga_fast").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    before = PAGE.read_text(encoding="utf-8")
    after = render(before)
    if options.check and after != before:
        raise SystemExit(f"{PAGE.name} is out of date; run python scripts/models_table.py")
    if not options.check:
        PAGE.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
