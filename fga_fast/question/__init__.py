"""What is asked of a model: targets, and the differentiable numbers that its output gives for them."""
