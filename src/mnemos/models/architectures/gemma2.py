"""Gemma 2: norms around each block, capped scores and logits, a window in every other layer. arXiv:2408.00118."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

from mnemos.contract import Cache
from mnemos.models.architectures.gemma import norm_offset
from mnemos.models.architectures.llama import Decoder
from mnemos.models.blocks import Attention, DecoderLayer, load_attention, load_gated_mlp, only, run_layers
from mnemos.models.config import GatedDecoderConfig, read_gated_decoder, read_shape
from mnemos.models.fields import Fields
from mnemos.models.weights import RMSNorm, Weights
from mnemos.ops.protocol import Array, Ops

GGUF_SANDWICH_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}

# What transformers takes a config to mean that leaves these out; null means none.
_DEFAULTS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096}


@dataclass(frozen=True, kw_only=True)
class Gemma2Config(GatedDecoderConfig):
    """Gemma 2's hyperparameters."""

    attention_bias: bool
    query_pre_attn_scalar: float  # scores are divided by its square root
    attn_logit_softcapping: float  # 0: none
    final_logit_softcapping: float  # 0: none

    @classmethod
    def read(cls, fields: Fields) -> Gemma2Config:
        """From a config.json or GGUF metadata; FormatError for a field that is missing or impossible."""
        fields = fields.renamed(hidden_act="hidden_activation")
        if not fields.is_gguf:
            fields = fields.with_defaults(_DEFAULTS)
        shape = read_shape(fields, head_dim=256, slides=lambda layer: layer % 2 == 0, tied=True)
        return cls(
            **read_gated_decoder(fields, shape, activation="gelu_pytorch_tanh"),
            attention_bias=fields.flag("attention_bias", False),
            query_pre_attn_scalar=read_query_scalar(fields, shape, widest=46),
            attn_logit_softcapping=read_softcap(fields, "attn_logit_softcapping"),
            final_logit_softcapping=read_softcap(fields, "final_logit_softcapping"),
        )


def read_query_scalar(fields: Fields, shape: dict[str, Any], widest: int) -> float:
    """What queries are divided by the root of. GGUF has no field for it, but only the 27B models, known by their
    number of layers `widest`, do not use the head's size."""
    if fields.is_gguf and shape["num_hidden_layers"] == widest:
        return float(shape["hidden_size"] / shape["num_attention_heads"])
    return fields.number("query_pre_attn_scalar", float(shape["head_dim"]) if fields.is_gguf else 256.0)


def read_softcap(fields: Fields, name: str) -> float:
    """The cap that field `name` sets, 0 where there is none."""
    return 0.0 if fields.get(name) is None else fields.number(name)


class SandwichLayer:
    """Norms before and after attention, and before and after the MLP, all inside the residual branches."""

    def __init__(self, weights: Weights, i: int, config: GatedDecoderConfig, attention: Attention) -> None:
        def norm(name: str) -> RMSNorm:
            name = f"layers.{i}.{name}"
            return weights.rms_norm(name, config.hidden_size, config.rms_norm_eps, offset=norm_offset(weights))

        self.input_norm = norm("input_layernorm")
        self.attention = attention
        self.post_attention_norm = norm("post_attention_layernorm")
        self.pre_mlp_norm = norm("pre_feedforward_layernorm")
        self.mlp = load_gated_mlp(weights, i, config)
        self.post_mlp_norm = norm("post_feedforward_layernorm")

    def __call__(self, ops: Ops, x: Array, batch: Any, cache: Cache, wanted: Array | None = None) -> Array:
        attended = self.attention(ops, self.input_norm(ops, x), batch, cache, wanted)
        x = ops.add(only(ops, x, wanted), self.post_attention_norm(ops, attended))
        return ops.add(x, self.post_mlp_norm(ops, self.mlp(ops, self.pre_mlp_norm(ops, x))))


class SandwichDecoder(Decoder):
    """Llama's frame with a scaled embedding and logits that may be capped."""

    def __init__(
        self, weights: Weights, config: GatedDecoderConfig, make_layer: Callable[[int], DecoderLayer], softcap: float
    ) -> None:
        """softcap: of the logits, 0 for none."""
        super().__init__(weights, config, make_layer, norm_offset(weights))
        self.softcap = softcap

    def forward(self, ops: Ops, batch: Any, cache: Cache) -> tuple[Array, Array]:
        x = ops.scale(ops.embed(self.embed_tokens, batch.token_ids), sqrt(self.config.hidden_size))
        hidden = self.norm(ops, run_layers(self.layers, ops, x, batch, cache))
        logits = ops.linear(hidden, self.lm_head)
        return hidden, ops.softcap(logits, self.softcap) if self.softcap else logits


class Gemma2(SandwichDecoder):
    """Gemma 2: attention with capped scores in every layer."""

    gguf_names: ClassVar[dict[str, str]] = GGUF_SANDWICH_NAMES

    def __init__(self, fields: Fields, weights: Weights) -> None:
        config = Gemma2Config.read(fields)
        rope, bias = config.rope.params(config.head_dim), config.attention_bias
        scale, softcap = config.query_pre_attn_scalar**-0.5, config.attn_logit_softcapping

        def make_layer(i: int) -> SandwichLayer:
            attention = load_attention(
                weights, i, config, rope, scale=scale, softcap=softcap, qkv_bias=bias, o_bias=bias
            )
            return SandwichLayer(weights, i, config, attention)

        super().__init__(weights, config, make_layer, config.final_logit_softcapping)
