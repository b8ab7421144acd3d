"""SmolLM3: Llama with tied embeddings and no rotation in every fourth layer (Yang et al. 2025, arXiv:2501.18795)."""

from __future__ import annotations

from mnemos.models.architectures.llama import Decoder, Layer, LlamaConfig
from mnemos.models.fields import Fields
from mnemos.models.weights import Weights


class SmolLM3(Decoder):
    """Llama's layers, of which some do not rotate."""

    def __init__(self, fields: Fields, weights: Weights) -> None:
        config = LlamaConfig.read(fields, theta=2e6, tied=True)
        rope, rotated = config.rope.params(config.head_dim), _rotated_layers(fields, config.num_hidden_layers)
        super().__init__(weights, config, lambda i: Layer(weights, i, config, rope if rotated[i] else None))


def _rotated_layers(fields: Fields, layers: int) -> tuple[bool, ...]:
    """`no_rope_layers` has, in spite of its name, 1 where a layer rotates."""
    listed = fields.sizes("no_rope_layers", layers)
    if listed:
        return tuple(bool(v) for v in listed)
    interval = fields.size("no_rope_layer_interval", 4)
    return tuple((layer + 1) % interval != 0 for layer in range(layers))
