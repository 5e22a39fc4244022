"""Changes of a traced graph that leave its numbers as they are."""
