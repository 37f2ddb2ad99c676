"""Examples to requests, scores to labels."""
