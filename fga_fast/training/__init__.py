"""Trains sparse autoencoders on the tokens of a model: `train.train`, with a `recipe.Recipe` for each."""
