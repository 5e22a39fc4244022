"""The stages in PyTorch's own operators: right on any device, with memory linear in tokens; no kernel of this project.

What a GPU runs until kernels of this project have been measured on one, and what other devices run. Unlike `reference/`
it keeps nothing of size tokens x tokens or patches x features: both are computed in chunks, when they are needed.
"""

from __future__ import annotations

from fga_fast.composite.attention import attention
from fga_fast.composite.score import score
from fga_fast.reference.gate import gate

__all__ = ["attention", "gate", "score"]
