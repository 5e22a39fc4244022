"""Plain settings from a small YAML file that is not trusted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fga_fast.io.json_file import read_bounded

MAX_YAML_BYTES = 1 << 14  # PyYAML takes a second or two for the worst files of this size
_EXPONENT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$")
_SCALARS = (str, int, float, bool, type(None))


def read_yaml(path: Path) -> dict[str, Any]:
    """The scalars in ``path``, and those one level below a name as a dict under that name; the rest is left out.

    Raises:
        FileNotFoundError: no such file.
        ImportError: PyYAML is not installed.
        ValueError: larger than `MAX_YAML_BYTES`, not YAML, a merge key, a tag that is not standard, or no mapping.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"{path}: needs PyYAML: pip install pyyaml, or write the settings as config.json") from error
    data = read_bounded(path, MAX_YAML_BYTES)
    try:
        loader = yaml.SafeLoader(data)
        # YAML 1.1 wants a dot in 1e-3; without it the number would be a text.
        loader.yaml_implicit_resolvers = {**loader.yaml_implicit_resolvers}
        for start in "-+0123456789":
            known = loader.yaml_implicit_resolvers.get(start, [])
            loader.yaml_implicit_resolvers[start] = [("tag:yaml.org,2002:float", _EXPONENT), *known]
        loader.flatten_mapping = lambda node: None  # merge keys, which grow a few bytes to any size, are refused
        settings = loader.get_single_data()
    except Exception as error:  # PyYAML raises anything from KeyError to RecursionError on odd files
        raise ValueError(f"{path}: not valid YAML ({error})") from error
    if settings is None:  # empty, or comments only
        return {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected settings by name, got {type(settings).__name__}")
    sections = {name: _scalars(value) for name, value in settings.items() if isinstance(value, dict)}
    return sections | _scalars(settings)


def _scalars(settings: dict[Any, Any]) -> dict[Any, Any]:
    return {name: value for name, value in settings.items() if isinstance(value, _SCALARS)}
