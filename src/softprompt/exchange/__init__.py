"""Soft prompts of other tools come in, and ours go out; both by way of the Hugging Face Hub, too."""
