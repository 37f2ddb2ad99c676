"""Learning a soft prompt."""
