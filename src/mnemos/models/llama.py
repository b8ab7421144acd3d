"""Llama 1 to 3 and what shares its form: SmolLM, Mistral, Yi, SmolLM3. Touvron et al. 2023, arXiv:2302.13971."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mnemos.models.activations import read_activation
from mnemos.models.decoder import (
    DecoderConfig,
    PreNormLayer,
    load_attention,
    load_gated_mlp,
    load_head,
    read_shape,
)
from mnemos.models.fields import Fields
from mnemos.models.rope import Rope, read_rope
from mnemos.models.weights import Weights
from mnemos.ops.protocol import Array, Cache, Ops


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    intermediate_size: int
    rms_norm_eps: float
    hidden_act: str
    rope: Rope
    rotated_layers: tuple[bool, ...]  # SmolLM3 leaves the rotation out in some layers
    sliding_window: int
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool

    @classmethod
    def read(cls, fields: Fields) -> LlamaConfig:
        shape = read_shape(fields)
        return cls(
            **shape,
            intermediate_size=fields.size("intermediate_size"),
            rms_norm_eps=fields.number("rms_norm_eps", None if fields.is_gguf else 1e-6, most=1.0),
            hidden_act=read_activation(fields, "hidden_act", "silu"),
            rope=read_rope(fields, shape["head_dim"]),
            rotated_layers=_rotated_layers(fields, shape["num_hidden_layers"]),
            sliding_window=fields.size("sliding_window", 0, least=0) if fields.flag("use_sliding_window", True) else 0,
            attention_bias=fields.flag("attention_bias", False),
            mlp_bias=fields.flag("mlp_bias", False),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        )


class Llama:
    gguf_names: ClassVar[dict[str, str]] = {}
    ignored: ClassVar[tuple[str, ...]] = ()

    def __init__(self, fields: Fields, weights: Weights) -> None:
        self.config = config = LlamaConfig.read(fields)
        self.embed_tokens = weights.matrix("embed_tokens", config.vocab_size, config.hidden_size)
        divisors = weights.values("rope_freqs", config.rope.rotary_dim // 2) if weights.is_gguf else None
        rope = config.rope.params(config.head_dim, divisors)
        self.layers = [
            PreNormLayer(
                input_norm=weights.rms_norm(f"layers.{i}.input_layernorm", config.hidden_size, config.rms_norm_eps),
                attention=load_attention(
                    weights,
                    i,
                    config,
                    rope if config.rotated_layers[i] else None,
                    window=config.sliding_window,
                    qkv_bias=config.attention_bias or weights.has(f"layers.{i}.self_attn.q_proj", ".bias"),
                    o_bias=config.attention_bias or weights.has(f"layers.{i}.self_attn.o_proj", ".bias"),
                    interleaved=config.rope.rotary_dim if weights.is_gguf else 0,
                ),
                mlp_norm=weights.rms_norm(
                    f"layers.{i}.post_attention_layernorm", config.hidden_size, config.rms_norm_eps
                ),
                mlp=self._mlp(weights, i),
            )
            for i in range(config.num_hidden_layers)
        ]
        self.norm = weights.rms_norm("norm", config.hidden_size, config.rms_norm_eps)
        self.lm_head = load_head(weights, self.embed_tokens, config, config.tie_word_embeddings)

    def _mlp(self, weights: Weights, layer: int) -> Any:
        config = self.config
        bias = config.mlp_bias or weights.has(f"layers.{layer}.mlp.gate_proj", ".bias")
        return load_gated_mlp(weights, layer, config.hidden_size, config.intermediate_size, config.hidden_act, bias)

    @property
    def window(self) -> int:
        return self.config.sliding_window

    def forward(self, ops: Ops, batch: Any, cache: Cache) -> tuple[Array, Array]:
        x = ops.embed(self.embed_tokens, batch.token_ids)
        for layer in self.layers:
            x = layer(ops, x, batch, cache)
        hidden = self.norm(ops, ops.rows(x, batch.logit_rows))
        return hidden, ops.linear(hidden, self.lm_head)


def _rotated_layers(fields: Fields, layers: int) -> tuple[bool, ...]:
    """no_rope_layers has 1 where a layer rotates, in spite of its name; without it every n-th layer does not."""
    listed = fields.sizes("no_rope_layers", layers)
    if listed:
        return tuple(bool(v) for v in listed)
    interval = fields.size("no_rope_layer_interval", layers + 1)
    return tuple((i + 1) % interval != 0 for i in range(layers))
