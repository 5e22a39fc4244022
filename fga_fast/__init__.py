"""fga_fast: feature-gradient attribution for vision transformers, within one forward and one backward pass.

Start with `Explainer`. Importing this package loads neither the native library nor Triton; the first explanation does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fga_fast.explainer import Explainer, explain
from fga_fast.models.find import find_layout
from fga_fast.models.layout import ModelLayout
from fga_fast.question.targets import Difference, Embedding
from fga_fast.result.explanation import Explanation
from fga_fast.sae import SparseAutoencoder
from fga_fast.sae.features import TopFeatures
from fga_fast.settings import Gate

if TYPE_CHECKING:
    from fga_fast import metrics
    from fga_fast.graph.package.load import Package, load_package
    from fga_fast.io.images import Preprocess, load_image

__version__ = "0.1.0"
__all__ = [
    "Difference",
    "Embedding",
    "Explainer",
    "Explanation",
    "Gate",
    "ModelLayout",
    "Package",
    "Preprocess",
    "SparseAutoencoder",
    "TopFeatures",
    "explain",
    "find_layout",
    "load_image",
    "load_package",
    "metrics",
]

# Loaded when they are first asked for: most explanations need none, and some import PIL or torch's tracer.
_LATE = {
    "Package": "fga_fast.graph.package.load",
    "load_package": "fga_fast.graph.package.load",
    "Preprocess": "fga_fast.io.images",
    "load_image": "fga_fast.io.images",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    if name == "metrics":
        return importlib.import_module("fga_fast.metrics")
    raise AttributeError(f"module 'fga_fast' has no attribute {name!r}")
