"""Reading plain ``name: value`` settings from a small YAML file that is not trusted.

Only scalars are read, at the outermost level and one below it. Everything else that YAML can express (anchors, tags,
lists, long texts) is ignored, so nothing in the file can call a function, refer to something else, or expand.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fga_fast.io.json_file import read_bounded

_LINE = re.compile(r"( *)([A-Za-z_][\w.-]*):(?:\s+(.*?))?\s*")
_WORDS: dict[str, Any] = {"true": True, "false": False, "null": None, "~": None, "": None}


def read_yaml(path: Path, limit: int) -> dict[str, Any]:
    """Return the scalars in ``path``, those one level below a name as a dict under that name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: larger than ``limit`` bytes, or not UTF-8.
    """
    try:
        lines = read_bounded(path, limit).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not valid YAML ({error})") from error
    settings: dict[str, Any] = {}
    section: dict[str, Any] | None = None
    indent = 0  # of the first line below the section's name: deeper lines belong to something else
    for line in lines:
        found = _LINE.fullmatch(line.split(" #")[0])
        if found is None:
            continue
        depth, name, text = len(found[1]), found[2], found[3] or ""
        if depth == 0:
            section, indent = (settings.setdefault(name, {}), 0) if text == "" else (None, 0)
            if text:
                settings[name] = _scalar(text)
        elif isinstance(section, dict) and text and depth == (indent or depth):
            indent = depth
            section[name] = _scalar(text)
    return settings


def _scalar(text: str) -> Any:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
