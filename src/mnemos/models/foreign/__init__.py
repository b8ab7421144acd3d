"""Any PyTorch module that returns logits, run as a `Model`."""
