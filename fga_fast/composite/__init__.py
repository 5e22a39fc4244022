"""The stages in PyTorch's own operators: right on any device, with memory linear in tokens; no kernel of this project.

GPUs run these until the kernels of this project have been measured on one, and other devices always do. Unlike
`reference/`, they keep nothing of size tokens x tokens or patches x features: they compute both in chunks.
"""

from __future__ import annotations

from fga_fast.composite.attention import attention
from fga_fast.composite.gate import gate
from fga_fast.composite.score import score

__all__ = ["attention", "gate", "score"]
