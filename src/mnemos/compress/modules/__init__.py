"""A user's own `nn.Module`, made smaller: pruned, distilled, quantized."""
