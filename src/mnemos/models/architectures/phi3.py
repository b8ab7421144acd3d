"""Phi-3 and Phi-4-mini: Llama with fused projections, LongRoPE, partial rotation. arXiv:2404.14219, 2503.01743."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mnemos.contract import Cache
from mnemos.models.activations import read_activation
from mnemos.models.blocks import Attention, DecoderConfig, GatedMLP, load_pre_norm_decoder, read_shape
from mnemos.models.fields import Fields
from mnemos.models.rope import Rope, read_rope
from mnemos.models.weights import Weights
from mnemos.ops.protocol import Array, AttentionParams, Ops, RopeParams


@dataclass(frozen=True, kw_only=True)
class Phi3Config(DecoderConfig):
    intermediate_size: int
    rms_norm_eps: float
    hidden_act: str
    rope: Rope
    tie_word_embeddings: bool

    @classmethod
    def read(cls, fields: Fields) -> Phi3Config:
        shape = read_shape(fields)
        return cls(
            **shape,
            intermediate_size=fields.size("intermediate_size"),
            rms_norm_eps=fields.number("rms_norm_eps", None if fields.is_gguf else 1e-5, most=1.0),
            hidden_act=read_activation(fields, "hidden_act", "silu"),
            rope=read_rope(fields, shape["head_dim"]),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        )


class Phi3:
    gguf_names: ClassVar[dict[str, str]] = {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
    ignored: ClassVar[tuple[str, ...]] = ()

    def __init__(self, fields: Fields, weights: Weights) -> None:
        self.config = config = Phi3Config.read(fields)
        rope = config.rope.params(config.head_dim)
        self.decoder = load_pre_norm_decoder(
            weights,
            config,
            config.rms_norm_eps,
            config.tie_word_embeddings,
            attention=lambda layer: _load_attention(weights, layer, config, rope),
            mlp=lambda layer: _load_mlp(weights, layer, config),
        )

    def forward(self, ops: Ops, batch: Any, cache: Cache) -> tuple[Array, Array]:
        return self.decoder(ops, batch, cache)


def _load_attention(weights: Weights, layer: int, config: Phi3Config, rope: RopeParams) -> Attention:
    """One tensor holds the rows of queries, then keys, then values."""
    name = f"layers.{layer}.self_attn"
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    k_start, v_start, end = heads * size, (heads + kv_heads) * size, (heads + 2 * kv_heads) * size
    q_proj, k_proj, v_proj = (
        weights.linear(f"{name}.qkv_proj", end, config.hidden_size, take=rows)
        for rows in (slice(0, k_start), slice(k_start, v_start), slice(v_start, end))
    )
    return Attention(
        q_proj,
        k_proj,
        v_proj,
        o_proj=weights.linear(f"{name}.o_proj", config.hidden_size, heads * size),
        layer=layer,
        params=AttentionParams(heads, kv_heads, size, size**-0.5, config.windows[layer]),
        rope=rope,
    )


def _load_mlp(weights: Weights, layer: int, config: Phi3Config) -> GatedMLP:
    """One tensor holds the rows of the gate, then those of the up projection."""
    name = f"layers.{layer}.mlp"
    inner = config.intermediate_size
    gate_proj, up_proj = (
        weights.linear(f"{name}.gate_up_proj", 2 * inner, config.hidden_size, take=rows)
        for rows in (slice(0, inner), slice(inner, 2 * inner))
    )
    return GatedMLP(
        gate_proj, up_proj, weights.linear(f"{name}.down_proj", config.hidden_size, inner), config.hidden_act
    )
