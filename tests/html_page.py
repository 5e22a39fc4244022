"""A page as a reader of its tags sees it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "line", "circle", "rect", "path", "img", "input", "br"}


class Page(HTMLParser):
    """The page's tags in order, by name, and its text; fails on what is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.found: dict[str, list[dict[str, str]]] = {}
        self.text = ""
        self.feed(text)
        assert self.open == []

    @property
    def headings(self) -> list[int]:
        """Levels of the headings."""
        return [int(tag[1]) for tag, _ in self.tags if re.fullmatch(r"h\d", tag)]

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self.found.setdefault(tag, []).append(self.tags[-1][1])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
