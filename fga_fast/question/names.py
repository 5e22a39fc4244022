"""Names of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def label(target: int, *names: Sequence[str] | Mapping[int, str] | None) -> str:
    """What a column of `logits` is called, in at most 24 characters; the first of `names` that knows it wins."""
    if target < 0:
        return "function"
    for known in names:
        try:
            if known is not None:
                name = known[target]
                return name if len(name) <= 24 else name[:23] + "…"
        except (IndexError, KeyError):  # these names leave it out
            continue
    return f"class {target}"
