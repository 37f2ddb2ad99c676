"""What a soft prompt says and does, each figure beside its null."""
