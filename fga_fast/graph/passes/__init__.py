"""Passes over a traced graph: they make it faster and do not change its numbers."""
