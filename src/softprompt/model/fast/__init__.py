"""Ways to compute the same in less time."""
