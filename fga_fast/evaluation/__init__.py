"""How faithful explanations are: methods, data, metrics over many images and the statistics of them."""
