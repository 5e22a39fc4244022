"""Sparse autoencoders for a model: its residual streams are kept, SAEs are trained on them, measured and described."""
