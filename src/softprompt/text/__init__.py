"""Where things stand in a sequence, as tokens."""
