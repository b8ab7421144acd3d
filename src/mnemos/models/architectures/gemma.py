"""Gemma 1: Llama with scaled embeddings, norms that multiply by 1 + weight, and GeGLU. arXiv:2403.08295."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

from mnemos.contract import Cache
from mnemos.models.architectures.llama import Decoder
from mnemos.models.blocks import load_attention, load_gated_mlp, only, run_layers
from mnemos.models.config import GatedDecoderConfig, read_gated_decoder, read_shape
from mnemos.models.fields import Fields
from mnemos.models.weights import Weights
from mnemos.ops.protocol import Array, Ops, RopeParams


@dataclass(frozen=True, kw_only=True)
class GemmaConfig(GatedDecoderConfig):
    """Gemma 1's hyperparameters."""

    attention_bias: bool

    @classmethod
    def read(cls, fields: Fields) -> GemmaConfig:
        """From a config.json or GGUF metadata; FormatError for a field that is missing or impossible."""
        if fields.get("hidden_activation") is not None:
            fields = fields.renamed(hidden_act="hidden_activation")
        return cls(
            **read_gated_decoder(fields, read_shape(fields, head_dim=256, tied=True), activation="gelu_pytorch_tanh"),
            attention_bias=fields.flag("attention_bias", False),
        )


class Layer:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, weights: Weights, i: int, config: GemmaConfig, rope: RopeParams) -> None:
        name, size, epsilon = f"layers.{i}", config.hidden_size, config.rms_norm_eps
        bias, offset = config.attention_bias, norm_offset(weights)
        self.input_norm = weights.rms_norm(f"{name}.input_layernorm", size, epsilon, offset=offset)
        self.mlp_norm = weights.rms_norm(f"{name}.post_attention_layernorm", size, epsilon, offset=offset)
        self.attention = load_attention(weights, i, config, rope, qkv_bias=bias, o_bias=bias)
        self.mlp = load_gated_mlp(weights, i, config)

    def __call__(self, ops: Ops, x: Array, batch: Any, cache: Cache, wanted: Array | None = None) -> Array:
        attended = self.attention(ops, self.input_norm(ops, x), batch, cache, wanted)
        x = ops.add(only(ops, x, wanted), attended)
        return ops.add(x, self.mlp(ops, self.mlp_norm(ops, x)))


class Gemma(Decoder):
    """Gemma's layers in Llama's frame, with a scaled embedding."""

    def __init__(self, fields: Fields, weights: Weights) -> None:
        config = GemmaConfig.read(fields)
        rope = config.rope.params(config.head_dim)
        super().__init__(weights, config, lambda i: Layer(weights, i, config, rope), norm_offset(weights))

    def forward(self, ops: Ops, batch: Any, cache: Cache) -> tuple[Array, Array]:
        x = ops.scale(ops.embed(self.embed_tokens, batch.token_ids), sqrt(self.config.hidden_size))
        hidden = self.norm(ops, run_layers(self.layers, ops, x, batch, cache))
        return hidden, ops.linear(hidden, self.lm_head)


def norm_offset(weights: Weights) -> float:
    """Gemma's norms multiply by 1 + weight; GGUF files hold the sum already."""
    return 0.0 if weights.is_gguf else 1.0
