"""Libraries that only some data sets and evaluations need, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

_EXTRA = {"pyarrow": "fga_fast[evaluate]", "scipy": "fga_fast[evaluate]", "open_clip": "open_clip_torch"}


def need(module: str) -> Any:
    """The module.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.split(".")[0]
        what = _EXTRA.get(library, library)
        raise ImportError(f"{library} is missing, which is needed here: pip install '{what}' ({error})") from error
