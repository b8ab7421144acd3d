"""Gemma 2: norms around each block, capped scores and logits, a window in every other layer. arXiv:2408.00118."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

from mnemos.contract import Cache
from mnemos.models.activations import read_activation
from mnemos.models.architectures.gemma import gemma_norm_offset
from mnemos.models.blocks import (
    Attention,
    DecoderConfig,
    GatedMLP,
    load_attention,
    load_gated_mlp,
    load_head,
    only,
    read_shape,
    run_layers,
)
from mnemos.models.fields import Fields
from mnemos.models.rope import Rope, read_rope
from mnemos.models.weights import RMSNorm, Weights
from mnemos.ops.protocol import Array, Matrix, Ops

GGUF_SANDWICH_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}

# What transformers takes a config to mean that leaves these out; null means none.
_DEFAULTS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096}


@dataclass(frozen=True, kw_only=True)
class Gemma2Config(DecoderConfig):
    intermediate_size: int
    rms_norm_eps: float
    hidden_activation: str
    rope: Rope
    attention_bias: bool
    query_pre_attn_scalar: float
    attn_logit_softcapping: float  # 0: none
    final_logit_softcapping: float  # 0: none
    tie_word_embeddings: bool

    @classmethod
    def read(cls, fields: Fields) -> Gemma2Config:
        if not fields.is_gguf:
            fields = fields.with_defaults(_DEFAULTS)
        shape = read_shape(fields, head_dim=256, slides=lambda layer: layer % 2 == 0)
        return cls(
            **shape,
            intermediate_size=fields.size("intermediate_size"),
            rms_norm_eps=fields.number("rms_norm_eps", None if fields.is_gguf else 1e-6, most=1.0),
            hidden_activation=read_activation(fields, "hidden_activation", "gelu_pytorch_tanh"),
            rope=read_rope(fields, shape["head_dim"]),
            attention_bias=fields.flag("attention_bias", False),
            query_pre_attn_scalar=read_query_scalar(fields, shape, widest=46),
            attn_logit_softcapping=read_softcap(fields, "attn_logit_softcapping"),
            final_logit_softcapping=read_softcap(fields, "final_logit_softcapping"),
            tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        )


def read_query_scalar(fields: Fields, shape: dict[str, Any], widest: int) -> float:
    """What queries are divided by the root of. GGUF has no field for it, but only the 27B models, known by their
    number of layers `widest`, do not use the head's size."""
    if fields.is_gguf and shape["num_hidden_layers"] == widest:
        return float(shape["hidden_size"] / shape["num_attention_heads"])
    return fields.number("query_pre_attn_scalar", float(shape["head_dim"]) if fields.is_gguf else 256.0)


def read_softcap(fields: Fields, name: str) -> float:
    return 0.0 if fields.get(name) is None else fields.number(name)


@dataclass(frozen=True)
class SandwichLayer:
    """Norms before and after attention, and before and after the MLP, all inside the residual branches."""

    input_norm: RMSNorm
    attention: Attention
    post_attention_norm: RMSNorm
    pre_mlp_norm: RMSNorm
    mlp: GatedMLP
    post_mlp_norm: RMSNorm

    def __call__(self, ops: Ops, x: Array, batch: Any, cache: Cache, wanted: Array | None = None) -> Array:
        attended = self.attention(ops, self.input_norm(ops, x), batch, cache, wanted)
        x = ops.add(only(ops, x, wanted), self.post_attention_norm(ops, attended))
        return ops.add(x, self.post_mlp_norm(ops, self.mlp(ops, self.pre_mlp_norm(ops, x))))


def load_sandwich_layer(
    weights: Weights, layer: int, config: DecoderConfig, epsilon: float, attention: Attention, mlp: GatedMLP
) -> SandwichLayer:
    offset = gemma_norm_offset(weights)

    def norm(name: str) -> RMSNorm:
        return weights.rms_norm(f"layers.{layer}.{name}", config.hidden_size, epsilon, offset=offset)

    return SandwichLayer(
        input_norm=norm("input_layernorm"),
        attention=attention,
        post_attention_norm=norm("post_attention_layernorm"),
        pre_mlp_norm=norm("pre_feedforward_layernorm"),
        mlp=mlp,
        post_mlp_norm=norm("post_feedforward_layernorm"),
    )


@dataclass(frozen=True)
class SandwichDecoder:
    """Scaled embedding, layers of SandwichLayer, a last norm and logits that may be capped."""

    embed_tokens: Matrix
    embed_scale: float
    layers: list[SandwichLayer]
    norm: RMSNorm
    lm_head: Matrix
    softcap: float

    def __call__(self, ops: Ops, batch: Any, cache: Cache) -> tuple[Array, Array]:
        x = ops.scale(ops.embed(self.embed_tokens, batch.token_ids), self.embed_scale)
        hidden = self.norm(ops, run_layers(self.layers, ops, x, batch, cache))
        logits = ops.linear(hidden, self.lm_head)
        return hidden, ops.softcap(logits, self.softcap) if self.softcap else logits


class Gemma2:
    gguf_names: ClassVar[dict[str, str]] = GGUF_SANDWICH_NAMES
    ignored: ClassVar[tuple[str, ...]] = ()

    def __init__(self, fields: Fields, weights: Weights) -> None:
        self.config = config = Gemma2Config.read(fields)
        rope = config.rope.params(config.head_dim)
        embed_tokens = weights.matrix("embed_tokens", config.vocab_size, config.hidden_size)

        def layer(i: int) -> SandwichLayer:
            attention = load_attention(
                weights,
                i,
                config,
                rope,
                scale=config.query_pre_attn_scalar**-0.5,
                softcap=config.attn_logit_softcapping,
                qkv_bias=config.attention_bias,
                o_bias=config.attention_bias,
            )
            mlp = load_gated_mlp(weights, i, config.hidden_size, config.intermediate_size, config.hidden_activation)
            return load_sandwich_layer(weights, i, config, config.rms_norm_eps, attention, mlp)

        self.decoder = SandwichDecoder(
            embed_tokens=embed_tokens,
            embed_scale=sqrt(config.hidden_size),
            layers=[layer(i) for i in range(config.num_hidden_layers)],
            norm=weights.rms_norm("norm", config.hidden_size, config.rms_norm_eps, offset=gemma_norm_offset(weights)),
            lm_head=load_head(weights, embed_tokens, config, config.tie_word_embeddings),
            softcap=config.final_logit_softcapping,
        )

    def forward(self, ops: Ops, batch: Any, cache: Cache) -> tuple[Array, Array]:
        return self.decoder(ops, batch, cache)
