"""Soft prompts as records, as files, and in the store."""
