"""OLMo 2: norms after each block instead of before it, and of all queries and keys at once. arXiv:2501.00656."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from mnemos.contract import Cache
from mnemos.models.architectures.llama import Decoder
from mnemos.models.blocks import load_attention, load_gated_mlp, only
from mnemos.models.config import GatedDecoderConfig, read_gated_decoder, read_shape
from mnemos.models.fields import Fields
from mnemos.models.weights import Weights
from mnemos.ops.protocol import Array, Ops, RopeParams


@dataclass(frozen=True, kw_only=True)
class Olmo2Config(GatedDecoderConfig):
    """OLMo 2's hyperparameters."""

    attention_bias: bool

    @classmethod
    def read(cls, fields: Fields) -> Olmo2Config:
        """From a config.json or GGUF metadata; FormatError for a field that is missing or impossible."""
        return cls(
            **read_gated_decoder(fields, read_shape(fields), epsilon=1e-5),
            attention_bias=fields.flag("attention_bias", False),
        )


class Layer:
    """x + norm(attention(x)), then x + norm(mlp(x))."""

    def __init__(self, weights: Weights, i: int, config: Olmo2Config, rope: RopeParams) -> None:
        name, size, epsilon, bias = f"layers.{i}", config.hidden_size, config.rms_norm_eps, config.attention_bias
        queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.attention = replace(
            load_attention(weights, i, config, rope, qkv_bias=bias, o_bias=bias),
            q_norm=weights.rms_norm(f"{name}.self_attn.q_norm", queries, epsilon),
            k_norm=weights.rms_norm(f"{name}.self_attn.k_norm", keys, epsilon),
        )
        self.attention_norm = weights.rms_norm(f"{name}.post_attention_layernorm", size, epsilon)
        self.mlp = load_gated_mlp(weights, i, config)
        self.mlp_norm = weights.rms_norm(f"{name}.post_feedforward_layernorm", size, epsilon)

    def __call__(self, ops: Ops, x: Array, batch: Any, cache: Cache, wanted: Array | None = None) -> Array:
        attended = self.attention_norm(ops, self.attention(ops, x, batch, cache, wanted))
        x = ops.add(only(ops, x, wanted), attended)
        return ops.add(x, self.mlp_norm(ops, self.mlp(ops, x)))


class Olmo2(Decoder):
    """OLMo 2's layers in Llama's frame."""

    gguf_names: ClassVar[dict[str, str]] = {
        "post_attention_layernorm": "post_attention_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }

    def __init__(self, fields: Fields, weights: Weights) -> None:
        config = Olmo2Config.read(fields)
        rope = config.rope.params(config.head_dim)
        super().__init__(weights, config, lambda i: Layer(weights, i, config, rope))
