"""fga_fast: feature-gradient attribution for vision transformers, within one forward and one backward pass.

Start with `Explainer`. Importing this package loads neither the native library nor Triton; the first explanation does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fga_fast.explainer import Explainer, explain
from fga_fast.models.layout import ModelLayout
from fga_fast.question.readout import Difference, Embedding
from fga_fast.result.explanation import Explanation
from fga_fast.sae import SparseAutoencoder
from fga_fast.sae.features import TopFeatures
from fga_fast.settings import Gate

if TYPE_CHECKING:
    from fga_fast.graph.package.load import Package, load_package

__version__ = "0.1.0"
__all__ = [
    "Difference",
    "Embedding",
    "Explainer",
    "Explanation",
    "Gate",
    "ModelLayout",
    "Package",
    "SparseAutoencoder",
    "TopFeatures",
    "explain",
    "load_package",
]


def __getattr__(name: str) -> Any:
    if name in ("Package", "load_package"):  # which import torch's tracer, of no use to most
        from fga_fast.graph.package import load

        return getattr(load, name)
    raise AttributeError(f"module 'fga_fast' has no attribute {name!r}")
