"""Residual streams of a model as tokens to train autoencoders on: kept on disk, or taken while the model runs.

`run.harvest` keeps them, `activations.Activations` reads them, and `tokens.Tokens` says how training takes them.
"""
