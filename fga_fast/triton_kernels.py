"""Finds the Triton kernels: the installed package `fga_fast.kernels`, or the folder `kernels/` of a source tree."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_NAME = "fga_fast.kernels"


@functools.cache
def load() -> ModuleType:
    """The package of Triton kernels. Cheap after the first call.

    Raises:
        ImportError: Triton or the kernels are not installed.
    """
    if importlib.util.find_spec(_NAME) is None:
        # Installed, kernels/ is a subpackage; in a source tree it lies beside the package, as setup.py says.
        folder = Path(__file__).resolve().parent.parent / "kernels"
        spec = importlib.util.spec_from_file_location(
            _NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None or not (folder / "__init__.py").is_file():
            raise ImportError(f"{_NAME} is not installed; install fga_fast again")
        module = importlib.util.module_from_spec(spec)
        sys.modules[_NAME] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[_NAME]
            raise
    return importlib.import_module(_NAME)
