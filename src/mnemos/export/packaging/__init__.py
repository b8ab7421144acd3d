"""Packages: a model with its tokenizer, its config and all that proves them, as one folder or file that travels."""
