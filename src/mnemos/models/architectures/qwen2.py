"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values. Yang et al. 2024, arXiv:2407.10671."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mnemos.contract import Cache
from mnemos.models.architectures.llama import Decoder
from mnemos.models.blocks import load_attention, load_gated_mlp, only
from mnemos.models.config import GatedDecoderConfig, read_gated_decoder, read_shape
from mnemos.models.fields import Fields
from mnemos.models.weights import Weights
from mnemos.ops.protocol import Array, Ops, RopeParams


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(GatedDecoderConfig):
    """Qwen2's hyperparameters."""

    @classmethod
    def read(cls, fields: Fields) -> Qwen2Config:
        """From a config.json or GGUF metadata; FormatError for a field that is missing or impossible."""
        return cls(**read_gated_decoder(fields, read_qwen_shape(fields)))


def read_qwen_shape(fields: Fields, head_dim: int | None = None) -> dict[str, Any]:
    """The shape; a sliding window, if switched on, begins at layer `max_window_layers`."""
    if not fields.is_gguf and not fields.flag("use_sliding_window", False):
        return read_shape(fields, head_dim=head_dim) | {"windows": (0,) * fields.size("num_hidden_layers")}
    first = fields.size("max_window_layers", 28, least=0)
    return read_shape(fields, head_dim=head_dim, slides=lambda layer: layer >= first)


class Layer:
    """x + attention(norm(x)), then x + mlp(norm(x)); queries, keys and values have biases."""

    def __init__(self, weights: Weights, i: int, config: Qwen2Config, rope: RopeParams) -> None:
        name, size, epsilon = f"layers.{i}", config.hidden_size, config.rms_norm_eps
        self.input_norm = weights.rms_norm(f"{name}.input_layernorm", size, epsilon)
        self.mlp_norm = weights.rms_norm(f"{name}.post_attention_layernorm", size, epsilon)
        self.attention = load_attention(weights, i, config, rope, qkv_bias=True)
        self.mlp = load_gated_mlp(weights, i, config)

    def __call__(self, ops: Ops, x: Array, batch: Any, cache: Cache, wanted: Array | None = None) -> Array:
        attended = self.attention(ops, self.input_norm(ops, x), batch, cache, wanted)
        x = ops.add(only(ops, x, wanted), attended)
        return ops.add(x, self.mlp(ops, self.mlp_norm(ops, x)))


class Qwen2(Decoder):
    """Qwen2's layers in Llama's frame."""

    def __init__(self, fields: Fields, weights: Weights) -> None:
        config = Qwen2Config.read(fields)
        rope = config.rope.params(config.head_dim)
        super().__init__(weights, config, lambda i: Layer(weights, i, config, rope))
