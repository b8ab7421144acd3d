"""Measures a model on this machine: speed, startup, memory, serving, kernels."""
