"""Sparse autoencoders (SAEs) trained on a Vision Transformer's residual stream: the frozen type and its formats."""

from __future__ import annotations

from fga_fast.sae.normalise import denormalise, normalise
from fga_fast.sae.self_check import SelfCheck
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder

__all__ = ["SparseAutoencoder", "SelfCheck", "normalise", "denormalise"]
