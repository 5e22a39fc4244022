"""The command line, a thin adapter over `Explainer`: `fga-fast explain` and `fga-fast export`."""
