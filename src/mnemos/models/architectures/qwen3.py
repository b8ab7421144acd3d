"""Qwen3: Llama with a norm on each query and key head. Yang et al. 2025, arXiv:2505.09388."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mnemos.contract import Cache
from mnemos.models.activations import read_activation
from mnemos.models.architectures.qwen2 import read_qwen_shape
from mnemos.models.blocks import DecoderConfig, HeadNorm, load_attention, load_gated_mlp, load_pre_norm_decoder
from mnemos.models.fields import Fields
from mnemos.models.rope import Rope, read_rope
from mnemos.models.weights import Weights
from mnemos.ops.protocol import Array, Ops


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(DecoderConfig):
    intermediate_size: int
    rms_norm_eps: float
    hidden_act: str
    rope: Rope
    attention_bias: bool
    tie_word_embeddings: bool

    @classmethod
    def read(cls, fields: Fields) -> Qwen3Config:
        shape = read_qwen_shape(fields, head_dim=128)
        return cls(
            **shape,
            intermediate_size=fields.size("intermediate_size"),
            rms_norm_eps=fields.number("rms_norm_eps", None if fields.is_gguf else 1e-6, most=1.0),
            hidden_act=read_activation(fields, "hidden_act", "silu"),
            rope=read_rope(fields, shape["head_dim"]),
            attention_bias=fields.flag("attention_bias", False),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        )


class Qwen3:
    gguf_names: ClassVar[dict[str, str]] = {}
    ignored: ClassVar[tuple[str, ...]] = ()

    def __init__(self, fields: Fields, weights: Weights) -> None:
        self.config = config = Qwen3Config.read(fields)
        rope = config.rope.params(config.head_dim)
        self.decoder = load_pre_norm_decoder(
            weights,
            config,
            config.rms_norm_eps,
            config.tie_word_embeddings,
            attention=lambda layer: load_attention(
                weights,
                layer,
                config,
                rope,
                qkv_bias=config.attention_bias,
                o_bias=config.attention_bias,
                head_norm=HeadNorm(config.rms_norm_eps),
            ),
            mlp=lambda layer: load_gated_mlp(
                weights, layer, config.hidden_size, config.intermediate_size, config.hidden_act
            ),
        )

    def forward(self, ops: Ops, batch: Any, cache: Cache) -> tuple[Array, Array]:
        return self.decoder(ops, batch, cache)
