"""Where a model's blocks, patches and pooling are: one file per model family."""

from __future__ import annotations

from fga_fast.models.layout import ModelLayout, active_randomness, find_layout

__all__ = ["ModelLayout", "active_randomness", "find_layout"]
