"""Gemma 1: Llama with scaled embeddings, norms that multiply by 1 + weight, and GeGLU. arXiv:2403.08295."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

from mnemos.contract import Cache
from mnemos.models.activations import read_activation
from mnemos.models.blocks import DecoderConfig, load_attention, load_gated_mlp, load_pre_norm_decoder, read_shape
from mnemos.models.fields import Fields
from mnemos.models.rope import Rope, read_rope
from mnemos.models.weights import Weights
from mnemos.ops.protocol import Array, Ops


@dataclass(frozen=True, kw_only=True)
class GemmaConfig(DecoderConfig):
    intermediate_size: int
    rms_norm_eps: float
    hidden_act: str
    rope: Rope
    attention_bias: bool
    tie_word_embeddings: bool

    @classmethod
    def read(cls, fields: Fields) -> GemmaConfig:
        shape = read_shape(fields, head_dim=256)
        activation = "hidden_act" if fields.get("hidden_activation") is None else "hidden_activation"
        return cls(
            **shape,
            intermediate_size=fields.size("intermediate_size"),
            rms_norm_eps=fields.number("rms_norm_eps", None if fields.is_gguf else 1e-6, most=1.0),
            hidden_act=read_activation(fields, activation, "gelu_pytorch_tanh"),
            rope=read_rope(fields, shape["head_dim"]),
            attention_bias=fields.flag("attention_bias", False),
            tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        )


class Gemma:
    gguf_names: ClassVar[dict[str, str]] = {}
    ignored: ClassVar[tuple[str, ...]] = ()

    def __init__(self, fields: Fields, weights: Weights) -> None:
        self.config = config = GemmaConfig.read(fields)
        rope = config.rope.params(config.head_dim)
        bias = config.attention_bias
        self.decoder = load_pre_norm_decoder(
            weights,
            config,
            config.rms_norm_eps,
            config.tie_word_embeddings,
            attention=lambda layer: load_attention(weights, layer, config, rope, qkv_bias=bias, o_bias=bias),
            mlp=lambda layer: load_gated_mlp(
                weights, layer, config.hidden_size, config.intermediate_size, config.hidden_act
            ),
            norm_offset=gemma_norm_offset(weights),
            embed_scale=sqrt(config.hidden_size),
        )

    def forward(self, ops: Ops, batch: Any, cache: Cache) -> tuple[Array, Array]:
        return self.decoder(ops, batch, cache)


def gemma_norm_offset(weights: Weights) -> float:
    """Gemma's norms multiply by 1 + weight; GGUF files hold the sum already."""
    return 0.0 if weights.is_gguf else 1.0
