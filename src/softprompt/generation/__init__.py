"""Continuing requests token by token."""
