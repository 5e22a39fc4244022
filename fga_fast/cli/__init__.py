"""The command line, a thin adapter over Explainer: `fga-fast explain` and what joins it."""

from __future__ import annotations
