"""fga_fast: feature-gradient attribution for vision transformers, within one forward and one backward pass.

Start with `Explainer`. Importing this package loads neither the native library nor Triton; the first explanation does.
"""

from fga_fast.explainer import Explainer, explain
from fga_fast.explanation import Explanation, TopFeatures
from fga_fast.gate import Gate
from fga_fast.models.layout import ModelLayout
from fga_fast.readout import Difference, Embedding
from fga_fast.sae import SparseAutoencoder

__version__ = "0.1.0"
__all__ = [
    "Difference",
    "Embedding",
    "Explainer",
    "Explanation",
    "Gate",
    "ModelLayout",
    "SparseAutoencoder",
    "TopFeatures",
    "explain",
]
