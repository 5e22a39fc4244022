"""Explanations compiled ahead of time with their weights, as files that Python and C++ run without the model."""
