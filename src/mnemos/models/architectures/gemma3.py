"""Gemma 3, text only: Gemma 2 with head norms, five local layers to one global one, each kind with its own rotary base.

Source: Gemma Team 2025, arXiv:2503.19786. Scores are not capped any more, whatever a config says. Of multimodal
checkpoints, the language model is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mnemos.errors import UnsupportedError
from mnemos.models.architectures.gemma import norm_offset
from mnemos.models.architectures.gemma2 import (
    GGUF_SANDWICH_NAMES,
    SandwichDecoder,
    SandwichLayer,
    read_query_scalar,
    read_softcap,
)
from mnemos.models.blocks import HeadNorm, load_attention
from mnemos.models.config import MOST_LAYERS, GatedDecoderConfig, read_gated_decoder, read_pattern, read_shape
from mnemos.models.fields import Fields
from mnemos.models.rope import Rope, read_rope
from mnemos.models.weights import Weights

# The multimodal checkpoints leave out what equals the defaults of their time.
_DEFAULTS = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}


@dataclass(frozen=True, kw_only=True)
class Gemma3Config(GatedDecoderConfig):
    """Gemma 3's hyperparameters; `rope` is that of the global layers."""

    local_rope: Rope
    attention_bias: bool
    query_pre_attn_scalar: float  # scores are divided by its square root
    final_logit_softcapping: float  # 0: none

    @classmethod
    def read(cls, fields: Fields) -> Gemma3Config:
        """From a config.json or GGUF metadata; FormatError for a field that is missing or impossible."""
        if fields.flag("use_bidirectional_attention", False):
            raise UnsupportedError(
                f"{fields.path}: field 'use_bidirectional_attention' is true; only causal models are supported"
            )
        fields = fields.renamed(hidden_act="hidden_activation")
        if not fields.is_gguf:
            fields = fields.with_defaults(_DEFAULTS)
        slides = read_pattern(fields, fields.size("num_hidden_layers", largest=MOST_LAYERS), default=6)
        shape = read_shape(fields, head_dim=256, slides=slides, tied=True)
        return cls(
            **read_gated_decoder(fields, shape, activation="gelu_pytorch_tanh", theta=1e6),
            local_rope=_read_local_rope(fields, shape),
            attention_bias=fields.flag("attention_bias", False),
            query_pre_attn_scalar=read_query_scalar(fields, shape, widest=62),
            final_logit_softcapping=read_softcap(fields, "final_logit_softcapping"),
        )


def _read_local_rope(fields: Fields, shape: dict[str, Any]) -> Rope:
    """Local layers keep their own base and are never scaled, unless a newer config says so for them."""
    table = fields.table("rope_parameters")
    if table is not None and table.get("sliding_attention") is not None:
        return read_rope(fields, shape["head_dim"], layer_type="sliding_attention")
    base = fields.number("rope_local_base_freq", 10000.0, above=1.0)
    return Rope(base, shape["head_dim"], context_length=shape["context_length"])


class Gemma3(SandwichDecoder):
    """Gemma 3: attention with head norms, its rotation that of a local or of a global layer."""

    gguf_names: ClassVar[dict[str, str]] = GGUF_SANDWICH_NAMES
    ignored: ClassVar[tuple[str, ...]] = ("*vision_tower.*", "*multi_modal_projector.*")

    def __init__(self, fields: Fields, weights: Weights) -> None:
        config = Gemma3Config.read(fields)
        global_rope, local_rope = config.rope.params(config.head_dim), config.local_rope.params(config.head_dim)
        scale, bias = config.query_pre_attn_scalar**-0.5, config.attention_bias
        head_norm = HeadNorm(config.rms_norm_eps, norm_offset(weights))

        def make_layer(i: int) -> SandwichLayer:
            rope = local_rope if config.windows[i] else global_rope
            attention = load_attention(
                weights, i, config, rope, scale=scale, qkv_bias=bias, o_bias=bias, head_norm=head_norm
            )
            return SandwichLayer(weights, i, config, attention)

        super().__init__(weights, config, make_layer, config.final_logit_softcapping)
