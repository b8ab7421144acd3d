"""Memory-augmented transformers: banks of learned vectors that layers attend to, as nn.Modules and over operators."""
