"""Gemma 3, text only: Gemma 2 with head norms, five local layers to one global one, each kind with its own rotary base.

Source: Gemma Team 2025, arXiv:2503.19786. Scores are not capped any more, whatever a config says. Of multimodal
checkpoints, the language model is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

from mnemos.contract import Cache
from mnemos.errors import UnsupportedError
from mnemos.models.activations import read_activation
from mnemos.models.architectures.gemma import gemma_norm_offset
from mnemos.models.architectures.gemma2 import (
    GGUF_SANDWICH_NAMES,
    SandwichDecoder,
    SandwichLayer,
    load_sandwich_layer,
    read_query_scalar,
    read_softcap,
)
from mnemos.models.blocks import DecoderConfig, HeadNorm, load_attention, load_gated_mlp, load_head, read_shape
from mnemos.models.fields import Fields
from mnemos.models.rope import Rope, read_rope
from mnemos.models.weights import Weights
from mnemos.ops.protocol import Array, Ops

# The multimodal checkpoints leave out what equals the defaults of their time.
_DEFAULTS = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}


@dataclass(frozen=True, kw_only=True)
class Gemma3Config(DecoderConfig):
    intermediate_size: int
    rms_norm_eps: float
    hidden_activation: str
    rope: Rope
    local_rope: Rope
    attention_bias: bool
    query_pre_attn_scalar: float
    final_logit_softcapping: float  # 0: none
    tie_word_embeddings: bool

    @classmethod
    def read(cls, fields: Fields) -> Gemma3Config:
        if fields.flag("use_bidirectional_attention", False):
            raise UnsupportedError(
                f"{fields.path}: field 'use_bidirectional_attention' is true; only causal models are supported"
            )
        if not fields.is_gguf:
            fields = fields.with_defaults(_DEFAULTS)
        pattern = fields.size("sliding_window_pattern", 6)
        shape = read_shape(fields, head_dim=256, slides=lambda layer: (layer + 1) % pattern != 0)
        return cls(
            **shape,
            intermediate_size=fields.size("intermediate_size"),
            rms_norm_eps=fields.number("rms_norm_eps", None if fields.is_gguf else 1e-6, most=1.0),
            hidden_activation=read_activation(fields, "hidden_activation", "gelu_pytorch_tanh"),
            rope=read_rope(fields, shape["head_dim"], theta=1e6, layer_type="full_attention"),
            local_rope=_read_local_rope(fields, shape),
            attention_bias=fields.flag("attention_bias", False),
            query_pre_attn_scalar=read_query_scalar(fields, shape, widest=62),
            final_logit_softcapping=read_softcap(fields, "final_logit_softcapping"),
            tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        )


def _read_local_rope(fields: Fields, shape: dict[str, Any]) -> Rope:
    """Local layers keep their own base and are never scaled, unless a newer config says so for them."""
    table = fields.table("rope_parameters")
    if table is not None and table.get("sliding_attention") is not None:
        return read_rope(fields, shape["head_dim"], layer_type="sliding_attention")
    base = fields.number("rope_local_base_freq", 10000.0, above=1.0)
    return Rope(base, shape["head_dim"], context_length=shape["context_length"])


class Gemma3:
    gguf_names: ClassVar[dict[str, str]] = GGUF_SANDWICH_NAMES
    ignored: ClassVar[tuple[str, ...]] = ("*vision_tower.*", "*multi_modal_projector.*")

    def __init__(self, fields: Fields, weights: Weights) -> None:
        self.config = config = Gemma3Config.read(fields)
        rope, local_rope = config.rope.params(config.head_dim), config.local_rope.params(config.head_dim)
        offset = gemma_norm_offset(weights)
        embed_tokens = weights.matrix("embed_tokens", config.vocab_size, config.hidden_size)

        def layer(i: int) -> SandwichLayer:
            attention = load_attention(
                weights,
                i,
                config,
                local_rope if config.windows[i] else rope,
                scale=config.query_pre_attn_scalar**-0.5,
                qkv_bias=config.attention_bias,
                o_bias=config.attention_bias,
                head_norm=HeadNorm(config.rms_norm_eps, offset),
            )
            mlp = load_gated_mlp(weights, i, config.hidden_size, config.intermediate_size, config.hidden_activation)
            return load_sandwich_layer(weights, i, config, config.rms_norm_eps, attention, mlp)

        self.decoder = SandwichDecoder(
            embed_tokens=embed_tokens,
            embed_scale=sqrt(config.hidden_size),
            layers=[layer(i) for i in range(config.num_hidden_layers)],
            norm=weights.rms_norm("norm", config.hidden_size, config.rms_norm_eps, offset=offset),
            lm_head=load_head(weights, embed_tokens, config, config.tie_word_embeddings),
            softcap=config.final_logit_softcapping,
        )

    def forward(self, ops: Ops, batch: Any, cache: Cache) -> tuple[Array, Array]:
        return self.decoder(ops, batch, cache)
