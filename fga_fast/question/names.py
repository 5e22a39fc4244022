"""Names of classes: the class that a name means, and the name of a class."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence


def class_number(name: str, names: Sequence[str], argument: str = "targets") -> int:
    """Number of the class that `name` means; errors call it `argument`.

    An exact name wins. Otherwise it is the one class that has `name` as a comma-separated synonym, or in other letter
    case: "Tabby cat" finds "tabby, tabby cat". A part of a name is not enough, but the error suggests names with it.
    """
    wanted = name.strip().casefold()
    if not wanted:
        raise ValueError(f"{argument}: expected the name of a class, got an empty one")
    found = [number for number, other in enumerate(names) if other == name]
    found = found or [number for number, other in enumerate(names) if wanted in _spellings(other)]
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(f"{number} ({names[number]})" for number in found[:8])
        raise ValueError(f"{argument}: {name!r} is a name of {len(found)} classes: {listed}; give the number")
    raise ValueError(
        f"{argument}: {name!r} is not among the names of the {len(names)} classes; {_advice(wanted, names)}"
    )


def _spellings(name: str) -> list[str]:
    """A class's name and its synonyms, all in one letter case."""
    whole = name.strip().casefold()
    return [whole, *(part.strip() for part in whole.split(","))]


def _advice(wanted: str, names: Sequence[str]) -> str:
    close = [name for name in names if wanted in name.casefold()]
    if not close:
        known = {spelling: name for name in names for spelling in _spellings(name)}
        close = [known[spelling] for spelling in difflib.get_close_matches(wanted, known)]
    if close:
        return f"did you mean {' or '.join(map(repr, list(dict.fromkeys(close))[:3]))}?"
    return f"they {'are' if len(names) <= 20 else 'begin'} {', '.join(map(repr, names[:20]))}"


def label(target: int, *names: Sequence[str] | Mapping[int, str] | None) -> str:
    """What a column of `logits` is called, in at most 24 characters; the first of `names` that knows it wins."""
    return short(whole_label(target, *names))


def short(name: str) -> str:
    """A name in at most 24 characters."""
    return name if len(name) <= 24 else name[:23] + "…"


def whole_label(target: int, *names: Sequence[str] | Mapping[int, str] | None) -> str:
    """As `label`, however long it is."""
    if target < 0:
        return "function"
    for known in names:
        try:
            if known is not None:
                return known[target]
        except (IndexError, KeyError):  # these names leave it out
            continue
    return f"class {target}"
