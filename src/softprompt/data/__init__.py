"""Data files and data sets: from a source to checked examples."""
