"""Phi-3 and Phi-4-mini: Llama with fused projections, LongRoPE, partial rotation. arXiv:2404.14219, 2503.01743."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mnemos.contract import Cache
from mnemos.models.architectures.llama import Decoder
from mnemos.models.blocks import Attention, GatedMLP, attention_params, only
from mnemos.models.config import GatedDecoderConfig, read_gated_decoder, read_shape
from mnemos.models.fields import Fields
from mnemos.models.weights import Weights
from mnemos.ops.protocol import Array, Ops, RopeParams


@dataclass(frozen=True, kw_only=True)
class Phi3Config(GatedDecoderConfig):
    """Phi-3's hyperparameters."""

    @classmethod
    def read(cls, fields: Fields) -> Phi3Config:
        """From a config.json or GGUF metadata; FormatError for a field that is missing or impossible."""
        return cls(**read_gated_decoder(fields, read_shape(fields), epsilon=1e-5))


class Layer:
    """x + attention(norm(x)), then x + mlp(norm(x)), from one tensor for q, k and v and one for gate and up."""

    def __init__(self, weights: Weights, i: int, config: Phi3Config, rope: RopeParams) -> None:
        name, size, epsilon, inner = f"layers.{i}", config.hidden_size, config.rms_norm_eps, config.intermediate_size
        queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.input_norm = weights.rms_norm(f"{name}.input_layernorm", size, epsilon)
        self.mlp_norm = weights.rms_norm(f"{name}.post_attention_layernorm", size, epsilon)
        q_proj, k_proj, v_proj = weights.split_linear(f"{name}.self_attn.qkv_proj", (queries, keys, keys), size)
        self.attention = Attention(
            q_proj,
            k_proj,
            v_proj,
            o_proj=weights.linear(f"{name}.self_attn.o_proj", size, queries),
            layer=i,
            params=attention_params(config, i),
            rope=rope,
        )
        gate_proj, up_proj = weights.split_linear(f"{name}.mlp.gate_up_proj", (inner, inner), size)
        self.mlp = GatedMLP(
            gate_proj,
            up_proj,
            down_proj=weights.linear(f"{name}.mlp.down_proj", size, inner),
            activation=config.hidden_act,
        )

    def __call__(self, ops: Ops, x: Array, batch: Any, cache: Cache, wanted: Array | None = None) -> Array:
        attended = self.attention(ops, self.input_norm(ops, x), batch, cache, wanted)
        x = ops.add(only(ops, x, wanted), attended)
        return ops.add(x, self.mlp(ops, self.mlp_norm(ops, x)))


class Phi3(Decoder):
    """Phi-3's layers in Llama's frame."""

    gguf_names: ClassVar[dict[str, str]] = {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}

    def __init__(self, fields: Fields, weights: Weights) -> None:
        config = Phi3Config.read(fields)
        rope = config.rope.params(config.head_dim)
        super().__init__(weights, config, lambda i: Layer(weights, i, config, rope))
