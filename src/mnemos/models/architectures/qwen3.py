"""Qwen3: Llama with a norm on each query and key head. Yang et al. 2025, arXiv:2505.09388."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mnemos.contract import Cache
from mnemos.models.architectures.llama import Decoder
from mnemos.models.architectures.qwen2 import read_qwen_shape
from mnemos.models.blocks import HeadNorm, load_attention, load_gated_mlp, only
from mnemos.models.config import GatedDecoderConfig, read_gated_decoder
from mnemos.models.fields import Fields
from mnemos.models.weights import Weights
from mnemos.ops.protocol import Array, Ops, RopeParams


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(GatedDecoderConfig):
    """Qwen3's hyperparameters."""

    attention_bias: bool

    @classmethod
    def read(cls, fields: Fields) -> Qwen3Config:
        """From a config.json or GGUF metadata; FormatError for a field that is missing or impossible."""
        return cls(
            **read_gated_decoder(fields, read_qwen_shape(fields, head_dim=128)),
            attention_bias=fields.flag("attention_bias", False),
        )


class Layer:
    """x + attention(norm(x)), then x + mlp(norm(x)); every query and key head is normalised before the rotation."""

    def __init__(self, weights: Weights, i: int, config: Qwen3Config, rope: RopeParams) -> None:
        name, size, epsilon = f"layers.{i}", config.hidden_size, config.rms_norm_eps
        bias, head_norm = config.attention_bias, HeadNorm(epsilon)
        self.input_norm = weights.rms_norm(f"{name}.input_layernorm", size, epsilon)
        self.mlp_norm = weights.rms_norm(f"{name}.post_attention_layernorm", size, epsilon)
        self.attention = load_attention(weights, i, config, rope, qkv_bias=bias, o_bias=bias, head_norm=head_norm)
        self.mlp = load_gated_mlp(weights, i, config)

    def __call__(self, ops: Ops, x: Array, batch: Any, cache: Cache, wanted: Array | None = None) -> Array:
        attended = self.attention(ops, self.input_norm(ops, x), batch, cache, wanted)
        x = ops.add(only(ops, x, wanted), attended)
        return ops.add(x, self.mlp(ops, self.mlp_norm(ops, x)))


class Qwen3(Decoder):
    """Qwen3's layers in Llama's frame."""

    def __init__(self, fields: Fields, weights: Weights) -> None:
        config = Qwen3Config.read(fields)
        rope = config.rope.params(config.head_dim)
        super().__init__(weights, config, lambda i: Layer(weights, i, config, rope))
