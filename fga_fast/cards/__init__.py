"""What the features of sparse autoencoders stand for: `run.feature_cards` makes a page of cards from a harvest."""
