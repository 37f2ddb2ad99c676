"""The frozen base model: loading it, and one pass through it."""
