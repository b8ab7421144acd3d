"""Llama 1 to 3 and what shares its form: SmolLM, Mistral, Yi. Touvron et al. 2023, arXiv:2302.13971."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mnemos.contract import Cache
from mnemos.models.activations import read_activation
from mnemos.models.blocks import (
    DecoderConfig,
    PreNormDecoder,
    load_attention,
    load_gated_mlp,
    load_pre_norm_decoder,
    read_shape,
)
from mnemos.models.fields import Fields
from mnemos.models.rope import Rope, read_rope
from mnemos.models.weights import Weights
from mnemos.ops.protocol import Array, Ops


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    intermediate_size: int
    rms_norm_eps: float
    hidden_act: str
    rope: Rope
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool

    @classmethod
    def read(cls, fields: Fields, *, theta: float = 10000.0, tied: bool = False) -> LlamaConfig:
        shape = read_shape(fields)
        return cls(
            **shape,
            intermediate_size=fields.size("intermediate_size"),
            rms_norm_eps=fields.number("rms_norm_eps", None if fields.is_gguf else 1e-6, most=1.0),
            hidden_act=read_activation(fields, "hidden_act", "silu"),
            rope=read_rope(fields, shape["head_dim"], theta=theta),
            attention_bias=fields.flag("attention_bias", False),
            mlp_bias=fields.flag("mlp_bias", False),
            tie_word_embeddings=fields.flag("tie_word_embeddings", tied),
        )


class Llama:
    gguf_names: ClassVar[dict[str, str]] = {}
    ignored: ClassVar[tuple[str, ...]] = ()

    def __init__(self, fields: Fields, weights: Weights) -> None:
        config = LlamaConfig.read(fields)
        self.config = config
        self.decoder = load_llama(weights, config, (True,) * config.num_hidden_layers)

    def forward(self, ops: Ops, batch: Any, cache: Cache) -> tuple[Array, Array]:
        return self.decoder(ops, batch, cache)


def load_llama(
    weights: Weights, config: LlamaConfig, rotated: tuple[bool, ...], neighbours: bool = False
) -> PreNormDecoder:
    """The decoder. GGUF has no field for biases, only tensors.

    rotated: which layers have rotary embeddings; neighbours: whether the file pairs neighbouring elements of a head,
    as GGUF files of this family do.
    """
    rope = config.rope.params(config.head_dim)

    def has_bias(name: str, configured: bool) -> bool:
        return weights.has(f"layers.0.{name}", ".bias") if weights.is_gguf else configured

    qkv_bias = has_bias("self_attn.q_proj", config.attention_bias)
    o_bias = has_bias("self_attn.o_proj", config.attention_bias)
    mlp_bias = has_bias("mlp.up_proj", config.mlp_bias)
    return load_pre_norm_decoder(
        weights,
        config,
        config.rms_norm_eps,
        config.tie_word_embeddings,
        attention=lambda layer: load_attention(
            weights,
            layer,
            config,
            rope if rotated[layer] else None,
            qkv_bias=qkv_bias,
            o_bias=o_bias,
            interleaved=config.rope.rotary_dim if weights.is_gguf or neighbours else 0,
        ),
        mlp=lambda layer: load_gated_mlp(
            weights, layer, config.hidden_size, config.intermediate_size, config.hidden_act, mlp_bias
        ),
    )
