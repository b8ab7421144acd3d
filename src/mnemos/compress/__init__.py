"""Smaller models, and what making them smaller has cost."""
