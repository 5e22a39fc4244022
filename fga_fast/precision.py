"""The one rule on precision."""

from __future__ import annotations

import torch


def relevance_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of relevance, scores, gates and softmax statistics: float64 for float64 models, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
