"""SmolLM3: Llama with tied embeddings and no rotation in every fourth layer (Yang et al. 2025, arXiv:2501.18795)."""

from __future__ import annotations

from typing import Any, ClassVar

from mnemos.contract import Cache
from mnemos.models.architectures.llama import LlamaConfig, load_llama
from mnemos.models.fields import Fields
from mnemos.models.weights import Weights
from mnemos.ops.protocol import Array, Ops


class SmolLM3:
    gguf_names: ClassVar[dict[str, str]] = {}
    ignored: ClassVar[tuple[str, ...]] = ()

    def __init__(self, fields: Fields, weights: Weights) -> None:
        self.config = LlamaConfig.read(fields, theta=2e6, tied=True)
        self.decoder = load_llama(weights, self.config, _rotated_layers(fields, self.config.num_hidden_layers))

    def forward(self, ops: Ops, batch: Any, cache: Cache) -> tuple[Array, Array]:
        return self.decoder(ops, batch, cache)


def _rotated_layers(fields: Fields, layers: int) -> tuple[bool, ...]:
    """`no_rope_layers` has, in spite of its name, 1 where a layer rotates."""
    listed = fields.sizes("no_rope_layers", layers)
    if listed:
        return tuple(bool(v) for v in listed)
    interval = fields.size("no_rope_layer_interval", 4)
    return tuple((layer + 1) % interval != 0 for layer in range(layers))
