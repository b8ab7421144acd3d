"""What a model does on this machine, measured: speed, start-up, memory, serving, kernels."""
