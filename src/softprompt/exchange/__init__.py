"""Soft prompts of other tools come in, and ours go out."""
