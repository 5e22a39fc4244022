"""The command line, a thin adapter over `Explainer`: `fga-fast explain`, `fga-fast evaluate` and `fga-fast export`."""
